// Pixel metrics over raw arrays: confusion counts and the AUC's integer rank statistic. No torch header.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
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

// 2 U, where U counts the (positive, negative) pairs whose positive scores higher, a tie as one half.
// score: [n], no NaN; truth: [n], 0 or 1. Exact for n below 2^31.
inline AucCounts auc_counts(const float* score, const uint8_t* truth, int64_t n) {
  constexpr int kBits = 11, kBins = 1 << kBits, kPasses = 3;
  std::vector<uint64_t> items(n), other(n);  // the key in the high half, the class in the lowest bit
  std::array<std::vector<int64_t>, kPasses> offset;
  for (auto& bins : offset) bins.assign(kBins, 0);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = ordered_key(score[i]);
    items[i] = (static_cast<uint64_t>(key) << 32) | truth[i];
    for (int p = 0; p < kPasses; ++p) ++offset[p][(key >> (kBits * p)) & (kBins - 1)];
  }
  for (int p = 0; p < kPasses; ++p) {
    int64_t total = 0;
    for (auto& bin : offset[p]) total += std::exchange(bin, total);
    for (const uint64_t item : items) other[offset[p][(item >> (32 + kBits * p)) & (kBins - 1)]++] = item;
    items.swap(other);
  }
  AucCounts counts;
  for (int64_t i = 0; i < n;) {
    const uint64_t key = items[i] >> 32;
    int64_t size = 0, positives = 0;
    for (; i < n && items[i] >> 32 == key; ++i, ++size) positives += items[i] & 1;
    counts.twice_u += positives * (2 * counts.negatives + (size - positives));
    counts.positives += positives;
    counts.negatives += size - positives;
  }
  return counts;
}

}  // namespace frd::native
