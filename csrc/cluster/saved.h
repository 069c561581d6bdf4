// Layout of `saved` [B, L]: element offsets, within one sample, of what a round saves for its backward pass.
// The only definition in C++; that in Python, with the same names, is frd_kernels/cluster/saved.py.
#pragma once
#include <cstdint>

namespace frd {

struct SavedRound {
  int64_t cosine;         // [N] with the own centre
  int64_t inv_norm;       // [N] 1 / norm of the key
  int64_t pooled;         // [O, C] bin means
  int64_t unit;           // [O, C] unit keys of the pooled tokens
  int64_t mean;           // [O, C] means of the clusters
  int64_t result;         // [O, C] centres of the round
  int64_t unit_inv_norm;  // [O] 1 / norm of the pooled key
  int64_t weight_sum;     // [O] 1 + sum of weights
  int64_t inv_bin_count;  // [O] 1 / tokens of the bin
  int64_t query;          // [J, C] paper only, as are the following
  int64_t projected;      // [J, C]
  int64_t offset;         // [J]
  int64_t product;        // [N, J] not in round 1
  int64_t end;
};

// columns: J, the centres of the last round; 0 without a dense dispatch.
inline SavedRound saved_round(int64_t begin, int64_t tokens, int64_t centres, int64_t channels,
                              int64_t columns, bool first) {
  SavedRound s{};
  int64_t at = begin;
  const auto take = [&](int64_t size) {
    const int64_t part = at;
    at += size;
    return part;
  };
  s.cosine = take(tokens);
  s.inv_norm = take(tokens);
  const int64_t size = centres * channels;
  s.pooled = take(size);
  s.unit = take(size);
  s.mean = take(size);
  s.result = take(size);
  s.unit_inv_norm = take(centres);
  s.weight_sum = take(centres);
  s.inv_bin_count = take(centres);
  s.query = take(columns * channels);
  s.projected = take(columns * channels);
  s.offset = take(columns);
  s.product = take(first ? 0 : tokens * columns);
  s.end = at;
  return s;
}

}  // namespace frd
