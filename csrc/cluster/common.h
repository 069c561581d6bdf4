// What every C++ implementation of the clustering shares: which pixels a pooled centre covers (the bins of
// adaptive_avg_pool2d), which of two scores wins a token, and when a norm counts as zero.
#pragma once
#include <cstdint>

#include "core/dtypes.h"

namespace frd {

// Along one axis, bin i of `bins` covers the pixels [bin_begin, bin_end) of `size`.
FRD_HD static inline int64_t bin_begin(int64_t bin, int64_t size, int64_t bins) { return bin * size / bins; }
FRD_HD static inline int64_t bin_end(int64_t bin, int64_t size, int64_t bins) {
  return ((bin + 1) * size + bins - 1) / bins;
}

// The bins first_bin .. last_bin (inclusive) are those that cover a pixel.
FRD_HD static inline int64_t first_bin(int64_t pixel, int64_t size, int64_t bins) {
  return pixel * bins / size;
}
FRD_HD static inline int64_t last_bin(int64_t pixel, int64_t size, int64_t bins) {
  return ((pixel + 1) * bins - 1) / size;
}

// Whether a later score takes the token from the best one so far: the lowest index keeps a tie, and the first
// NaN keeps all, as in torch.argmax.
template <class A>
FRD_HD static inline bool wins(A score, A best) {
  return score > best || (score != score && best == best);
}

// A norm up to this counts as zero: the row's direction is then row / kNormFloor, and passes no gradient.
constexpr double kNormFloor = 1e-12;

// 1 / max(norm, kNormFloor); a NaN passes, an infinite norm gives 0.
template <class A>
FRD_HD static inline A inverse_norm(A norm) {
  return norm <= A(kNormFloor) ? A(1) / A(kNormFloor) : A(1) / norm;
}

// Whether a row of this inverse norm has a direction that passes gradient.
template <class A>
FRD_HD static inline bool is_live(A inverse) {
  return !(inverse >= A(1) / A(kNormFloor));
}

// Tokens [B, N, C] in memory of any strides (in elements).
struct TokenView {
  void* data;
  DType dtype;
  int64_t batch, token, channel;
};

}  // namespace frd
