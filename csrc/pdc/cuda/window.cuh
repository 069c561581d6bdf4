// Arithmetic on a window of x in registers, all indices known at compile time. Of every pair of pixels only
// one difference is formed, first pixel minus second in row-major order, whichever of the two a weight
// subtracts: so neighbouring outputs share it, and the sign goes into the multiply-add.
#pragma once
#include "core/cuda_compat.h"
#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {

constexpr int kPdcSums = kPdcWeights + 1;  // dw and db

FRD_HD constexpr int pdc_reach(PdcKind kind) { return kernel_side(kind) / 2; }

// The kind of the stencil over dy that gives dx: plain with transformed weights, radial stays a difference.
FRD_HD constexpr PdcKind turned_kind(PdcKind kind) {
  return kind == PdcKind::radial ? PdcKind::radial : PdcKind::vanilla;
}

template <PdcKind kind, bool pure, int k>
struct PdcTerm {
  static constexpr Tap plus = plus_tap(kind, k), minus = minus_tap(kind, k);
  static constexpr bool plain = kind == PdcKind::vanilla;
  static constexpr bool zero = pure && plus.dy == minus.dy && plus.dx == minus.dx;  // x - x, whatever x
  static constexpr bool flipped =
      pure && !plain && (minus.dy < plus.dy || (minus.dy == plus.dy && minus.dx < plus.dx));

  // x_plus - theta x_minus around x[r + reach][c + reach], negated if `flipped`.
  template <class A, int rows, int columns>
  static __device__ __forceinline__ A difference(const A (&x)[rows][columns], int r, int c, A theta) {
    constexpr int reach = pdc_reach(kind);
    const A a = x[r + reach + plus.dy][c + reach + plus.dx];
    if constexpr (plain) {
      return a;
    } else {
      const A b = x[r + reach + minus.dy][c + reach + minus.dx];
      if constexpr (!pure) return a - theta * b;
      return flipped ? b - a : a - b;
    }
  }
};

// acc + sum_k w_k (x_plus - theta x_minus), k ascending.
template <PdcKind kind, bool pure, int k = 0, class A, int rows, int columns>
__device__ __forceinline__ A pdc_combine(A acc, const A (&x)[rows][columns], int r, int c,
                                         const A (&w)[kPdcWeights], A theta) {
  if constexpr (k < kPdcWeights) {
    using Term = PdcTerm<kind, pure, k>;
    if constexpr (!Term::zero) {
      const A d = Term::difference(x, r, c, theta);
      acc = Term::flipped ? acc - w[k] * d : acc + w[k] * d;
    }
    return pdc_combine<kind, pure, k + 1>(acc, x, r, c, w, theta);
  } else {
    return acc;
  }
}

// sums_k += g (x_plus - theta x_minus); the last of them += g.
template <PdcKind kind, bool pure, int k = 0, class A, int rows, int columns>
__device__ __forceinline__ void pdc_correlate(A (&sums)[kPdcSums], const A (&x)[rows][columns], int r, int c,
                                              A g, A theta) {
  if constexpr (k < kPdcWeights) {
    using Term = PdcTerm<kind, pure, k>;
    if constexpr (!Term::zero) {
      const A d = Term::difference(x, r, c, theta);
      sums[k] = Term::flipped ? sums[k] - g * d : sums[k] + g * d;
    }
    pdc_correlate<kind, pure, k + 1>(sums, x, r, c, g, theta);
  } else {
    sums[kPdcWeights] += g;
  }
}

// The same where `inside`, without a branch that would keep neighbouring outputs from sharing differences.
template <PdcKind kind, bool pure, class A, int rows, int columns>
__device__ __forceinline__ void pdc_correlate_if(bool inside, A (&sums)[kPdcSums],
                                                 const A (&x)[rows][columns], int r, int c, A g, A theta) {
  A added[kPdcSums];
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) added[k] = sums[k];
  pdc_correlate<kind, pure>(added, x, r, c, g, theta);
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) sums[k] = inside ? added[k] : sums[k];
}

// The weights of the stencil over dy, in place.
template <PdcKind kind, class A>
__device__ __forceinline__ void pdc_turn(A (&w)[kPdcWeights], A theta) {
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
