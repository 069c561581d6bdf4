// What the chain's kernels share: the bins of tokens, the best centre of a token, weights of tokens.
#pragma once
#include <cmath>

#include "cluster/cuda/chain_forward.h"
#include "cluster/cuda/rows.cuh"
#include "core/dependent_launch.cuh"

namespace frd {
namespace chain {

struct Bin {
  int top, bottom, left, right;
  __device__ int pixels() const { return (bottom - top) * (right - left); }
};
// The tokens of centre o, in 32 bits: an image's side times that of the grid is less than 2^31 (checked).
FRD_DEVICE Bin bin_of(const Round& r, int o) {
  const unsigned height = r.height, width = r.width, rows = r.rows, columns = r.columns;
  const unsigned row = static_cast<unsigned>(o) / columns, column = static_cast<unsigned>(o) - row * columns;
  return {static_cast<int>(row * height / rows), static_cast<int>(((row + 1) * height + rows - 1) / rows),
          static_cast<int>(column * width / columns),
          static_cast<int>(((column + 1) * width + columns - 1) / columns)};
}
// Calls f(token) in ascending order.
template <class F>
FRD_DEVICE void for_tokens(const Bin& bin, int width, const F& f) {
  for (int y = bin.top; y < bin.bottom; ++y)
    for (int x = bin.left; x < bin.right; ++x) f(y * width + x);
}

// p, known to point to global memory. A pointer of the arguments that is compared with null is else a generic
// one to the compiler for sm_100 and sm_120.
template <class T>
FRD_DEVICE T* in_global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Of a mask that is not 0.
FRD_DEVICE int lowest_bit(unsigned mask) {
#if defined(__CUDACC__)
  return __ffs(static_cast<int>(mask)) - 1;
#else
  return __builtin_ctz(mask);
#endif
}

// Calls f(o, bin) for the bins that cover a token, in ascending order.
template <class F>
FRD_DEVICE void for_bins(const Round& r, int token, const F& f) {
  const unsigned height = r.height, width = r.width, rows = r.rows, columns = r.columns;
  const unsigned y = static_cast<unsigned>(token) / width, x = static_cast<unsigned>(token) - y * width;
  const unsigned last_row = ((y + 1) * rows - 1) / height, last_column = ((x + 1) * columns - 1) / width;
#pragma unroll 1
  for (unsigned row = y * rows / height; row <= last_row; ++row)
#pragma unroll 1
    for (unsigned column = x * columns / width; column <= last_column; ++column) {
      const int o = static_cast<int>(row * columns + column);
      f(o, bin_of(r, o));
    }
}

FRD_DEVICE float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

// sigmoid(beta + alpha * cosine) of round t, numbered from 0
FRD_DEVICE float gate_of(const Forward& a, int t, float cosine) {
  return sigmoid(a.beta[t] + a.alpha[t] * cosine);
}
// What the arg-max of round t multiplies the cosines with.
FRD_DEVICE float order_of(const Forward& a, int t) {
  if (!a.ordered) return 1.f;
  const float alpha = a.alpha[a.weighted ? t : 0];
  return alpha > 0 ? 1.f : alpha < 0 ? -1.f : alpha;
}

// The centre with the highest order * cosine of those met, in any sequence, by the rule of wins().
struct Best {
  static constexpr int kNone = 0x7fffffff;
  float cosine;
  int centre;
  __device__ void meet(float order, float other, int o) {
    const float best = order * cosine, score = order * other;
    const bool equal = score == best || (score != score && best != best);
    if (o != kNone && (centre == kNone || (equal ? o < centre : wins(score, best))))
      cosine = other, centre = o;
  }
  // That of this lane and of the one whose number differs in `bit`.
  __device__ void meet_lane(float order, int bit) {
    const float other = __shfl_xor_sync(0xffffffffu, cosine, bit);
    meet(order, other, __shfl_xor_sync(0xffffffffu, centre, bit));
  }
};

}  // namespace chain
}  // namespace frd
