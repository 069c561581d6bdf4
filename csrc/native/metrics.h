// Pixel metrics over raw arrays: confusion counts and the AUC's integer rank statistic. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace frd::native {

struct ConfusionCounts {
  int64_t tp = 0, fp = 0, fn = 0, tn = 0;
};

// score: [n]; truth: [n], 0 or 1. A pixel is marked when score > threshold.
inline ConfusionCounts confusion_counts(const float* score, const uint8_t* truth, int64_t n,
                                        float threshold) {
  int64_t tp = 0, marked = 0, positive = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t m = score[i] > threshold, t = truth[i];
    tp += m & t;
    marked += m;
    positive += t;
  }
  return {tp, marked - tp, positive - tp, n - marked - positive + tp};
}

struct AucCounts {
  int64_t twice_u = 0, positives = 0, negatives = 0;
};

// Order-preserving map of a float (no NaN) to an unsigned integer; -0 and +0 give the same key.
inline uint32_t ordered_key(float value) {
  value += 0.0f;  // turns -0 into +0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The end of the run of equal keys that begins at `first`.
inline const uint32_t* end_of_run(const uint32_t* first, const uint32_t* last) {
  const uint32_t key = *first;
  while (first != last && *first == key) ++first;
  return first;
}

// 2 U, where U counts the (positive, negative) pairs whose positive scores higher, a tie as one half.
// score: [n], no NaN; truth: [n], 0 or 1. Exact for n below 2^31. Sorts in place: of a large photo the
// probabilities alone fill much of the memory.
inline AucCounts auc_counts(const float* score, const uint8_t* truth, int64_t n) {
  std::vector<uint32_t> keys(n);  // the negatives' from the front, the positives' from the back
  int64_t front = 0, back = n;
  for (int64_t i = 0; i < n; ++i) keys[truth[i] ? --back : front++] = ordered_key(score[i]);
  const uint32_t *negative = keys.data(), *negatives_end = negative + front;
  const uint32_t *positive = negatives_end, *positives_end = negative + n;
  std::sort(keys.begin(), keys.begin() + front);
  std::sort(keys.begin() + front, keys.end());
  AucCounts counts{0, n - front, front};
  int64_t below = 0;  // negatives that score lower than the positives of a run
  while (positive != positives_end) {
    const uint32_t* const run_end = end_of_run(positive, positives_end);
    while (negative != negatives_end && *negative < *positive) ++negative, ++below;
    int64_t tied = 0;
    while (negative != negatives_end && *negative == *positive) ++negative, ++tied;
    counts.twice_u += (run_end - positive) * (2 * below + tied);
    below += tied;
    positive = run_end;
  }
  return counts;
}

}  // namespace frd::native
