// Rules that all C++ implementations of the clustering share: the bins of adaptive_avg_pool2d, the argmax of
// the assignment, and when a norm counts as zero.
#pragma once
#include <cstdint>

#include "core/dtypes.h"

namespace frd {

// Along one axis of `size` pixels, bin `bin` of `bins` covers the pixels [bin_begin, bin_end).
FRD_HD static inline int64_t bin_begin(int64_t bin, int64_t size, int64_t bins) { return bin * size / bins; }
FRD_HD static inline int64_t bin_end(int64_t bin, int64_t size, int64_t bins) {
  return ((bin + 1) * size + bins - 1) / bins;
}

// The bins that cover a pixel are first_bin .. last_bin, inclusive.
FRD_HD static inline int64_t first_bin(int64_t pixel, int64_t size, int64_t bins) {
  return pixel * bins / size;
}
FRD_HD static inline int64_t last_bin(int64_t pixel, int64_t size, int64_t bins) {
  return ((pixel + 1) * bins - 1) / size;
}

// Whether a score replaces the best one so far, of a lower index. As in torch.argmax the lowest index wins a
// tie, and the first NaN wins over everything.
template <class A>
FRD_HD static inline bool wins(A score, A best) {
  return score > best || (score != score && best == best);
}

// A norm up to this counts as zero: the row is then divided by kNormFloor, and passes no gradient.
constexpr double kNormFloor = 1e-12;

// 1 / max(norm, kNormFloor); NaN stays NaN, and an infinite norm gives 0.
template <class A>
FRD_HD static inline A inverse_norm(A norm) {
  return norm <= A(kNormFloor) ? A(1) / A(kNormFloor) : A(1) / norm;
}

// Whether a row with this inverse norm passes a gradient, as its norm does not count as zero.
template <class A>
FRD_HD static inline bool is_live(A inverse) {
  return !(inverse >= A(1) / A(kNormFloor));
}

// Tokens [B, N, C] with any strides, given in elements.
struct TokenView {
  void* data;
  DType dtype;
  int64_t batch, token, channel;
};

}  // namespace frd
