// Element offsets into the per-sample `saved` buffer of what a round keeps for its backward pass. The one
// statement of this layout in C++; frd_kernels has the one in Python.
#pragma once
#include <cstdint>

namespace frd {

struct SavedRound {
  int64_t cosine, scale;               // [N]
  int64_t pooled, unit, mean, result;  // [O, C]
  int64_t unit_scale, mass, share;     // [O]
  int64_t query, projected, offset;    // paper only: [J, C], [J, C], [J]
  int64_t product;                     // paper only, not in round 1: [N, J]
  int64_t end;
};

// columns: J, centres of the last round; 0 where there is no dense dispatch.
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
  s.scale = take(tokens);
  const int64_t size = centres * channels;
  s.pooled = take(size);
  s.unit = take(size);
  s.mean = take(size);
  s.result = take(size);
  s.unit_scale = take(centres);
  s.mass = take(centres);
  s.share = take(centres);
  s.query = take(columns * channels);
  s.projected = take(columns * channels);
  s.offset = take(columns);
  s.product = take(first ? 0 : tokens * columns);
  s.end = at;
  return s;
}

}  // namespace frd
