// Arithmetic on a window of x in registers, with all indices known at compile time. For every pair of pixels
// only one difference is computed, the first pixel minus the second in row-major order, whichever of the two
// a weight subtracts. So neighbouring outputs share it, and the sign moves into the multiply-add.
#pragma once
#include "core/cuda_compat.h"
#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {

// Sums per channel of the weight's gradient: dw [9] and db.
constexpr int kPdcSums = kPdcWeights + 1;

FRD_HD constexpr int pdc_reach(PdcKind kind) { return kernel_side(kind) / 2; }

// The kind of the stencil over dy that gives dx: plain with transformed weights, but radial stays radial.
FRD_HD constexpr PdcKind input_grad_kind(PdcKind kind) {
  return kind == PdcKind::radial ? PdcKind::radial : PdcKind::vanilla;
}

template <PdcKind kind, bool pure, int k>
struct PdcTerm {
  static constexpr Tap plus = plus_tap(kind, k);
  static constexpr Tap minus = minus_tap(kind, k);
  static constexpr bool plain = kind == PdcKind::vanilla;
  // The term is x - x for every x.
  static constexpr bool is_zero = pure && plus.dy == minus.dy && plus.dx == minus.dx;
  static constexpr bool negated =
      pure && !plain && (minus.dy < plus.dy || (minus.dy == plus.dy && minus.dx < plus.dx));

  // x[plus] - theta x[minus] around x[r + reach][c + reach], with the opposite sign if `negated`.
  template <class A, int rows, int columns>
  static __device__ __forceinline__ A difference(const A (&x)[rows][columns], int r, int c, A theta) {
    constexpr int reach = pdc_reach(kind);
    const A a = x[r + reach + plus.dy][c + reach + plus.dx];
    if constexpr (plain) {
      return a;
    } else {
      const A b = x[r + reach + minus.dy][c + reach + minus.dx];
      if constexpr (!pure) return a - theta * b;
      return negated ? b - a : a - b;
    }
  }
};

// sum + sum_k w_k (x[plus_k] - theta x[minus_k]), k ascending, for the output at (r, c) of the window.
template <PdcKind kind, bool pure, int k = 0, class A, int rows, int columns>
__device__ __forceinline__ A pdc_combine(A sum, const A (&x)[rows][columns], int r, int c,
                                         const A (&w)[kPdcWeights], A theta) {
  if constexpr (k < kPdcWeights) {
    using Term = PdcTerm<kind, pure, k>;
    if constexpr (!Term::is_zero) {
      const A d = Term::difference(x, r, c, theta);
      sum = Term::negated ? sum - w[k] * d : sum + w[k] * d;
    }
    return pdc_combine<kind, pure, k + 1>(sum, x, r, c, w, theta);
  } else {
    return sum;
  }
}

// dw_k += dy (x[plus_k] - theta x[minus_k]), db += dy; sums [10] ends in db.
template <PdcKind kind, bool pure, int k = 0, class A, int rows, int columns>
__device__ __forceinline__ void pdc_correlate(A (&sums)[kPdcSums], const A (&x)[rows][columns], int r, int c,
                                              A dy, A theta) {
  if constexpr (k < kPdcWeights) {
    using Term = PdcTerm<kind, pure, k>;
    if constexpr (!Term::is_zero) {
      const A d = Term::difference(x, r, c, theta);
      sums[k] = Term::negated ? sums[k] - dy * d : sums[k] + dy * d;
    }
    pdc_correlate<kind, pure, k + 1>(sums, x, r, c, dy, theta);
  } else {
    sums[kPdcWeights] += dy;
  }
}

// The same if `inside`, without a branch that would keep neighbouring outputs from sharing differences.
template <PdcKind kind, bool pure, class A, int rows, int columns>
__device__ __forceinline__ void pdc_correlate_if(bool inside, A (&sums)[kPdcSums],
                                                 const A (&x)[rows][columns], int r, int c, A dy, A theta) {
  A added[kPdcSums];
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) added[k] = sums[k];
  pdc_correlate<kind, pure>(added, x, r, c, dy, theta);
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) sums[k] = inside ? added[k] : sums[k];
}

// dy = h <= 0 ? 0 : dy, then h = relu(h). A NaN of h stays, and lets dy through, as in torch.
template <class A, int n>
__device__ __forceinline__ void pdc_gate(A (&h)[n], A (&dy)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const bool closed = h[i] <= 0;
    dy[i] = closed ? A(0) : dy[i];
    h[i] = closed ? A(0) : h[i];
  }
}

// input_grad_weights() of pdc/weight.h with all indices known at compile time.
template <PdcKind kind, class A>
__device__ __forceinline__ void pdc_input_grad_weights(A (&w)[kPdcWeights], A theta) {
  A v[kPdcWeights];
  if constexpr (kind == PdcKind::radial) {
#pragma unroll
    for (int k = 0; k < kPdcWeights; ++k) v[k] = w[k == 0 ? 0 : kPdcWeights - k];
  } else {
    transform<kind>(w, theta, v);
#pragma unroll
    for (int k = 0; k < kPdcWeights / 2; ++k) {
      const A swapped = v[k];
      v[k] = v[kPdcWeights - 1 - k];
      v[kPdcWeights - 1 - k] = swapped;
    }
  }
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k) w[k] = v[k];
}

}  // namespace frd
