// The transform of a 3x3 parameter into the equivalent plain kernel, its transpose, and a rounding to 16 bits
// that preserves the sum of the taps.
#pragma once
#include <math.h>

#include "core/dtypes.h"
#include "pdc/taps.h"

namespace frd {

// The plain kernel v [side * side] that is equivalent to the difference convolution by w [9]:
// v[plus_k] += w_k, v[minus_k] -= theta w_k.
template <PdcKind kind, typename A>
FRD_HD inline void transform(const A* w, A theta, A* v) {
  constexpr int taps = kernel_side(kind) * kernel_side(kind);
  for (int i = 0; i < taps; ++i) v[i] = A(0);
  for (int k = 0; k < kPdcWeights; ++k) v[tap_index(kind, plus_tap(kind, k))] += w[k];
  if constexpr (kind != PdcKind::vanilla)
    for (int k = 0; k < kPdcWeights; ++k) v[tap_index(kind, minus_tap(kind, k))] -= theta * w[k];
}

// The transpose of transform(), w_k = v[plus_k] - theta v[minus_k]: from the gradient of the plain kernel
// v [side * side] to that of the parameter w [9].
template <PdcKind kind, typename A>
FRD_HD inline void transform_transposed(const A* v, A theta, A* w) {
  for (int k = 0; k < kPdcWeights; ++k) {
    w[k] = v[tap_index(kind, plus_tap(kind, k))];
    if constexpr (kind != PdcKind::vanilla) w[k] -= theta * v[tap_index(kind, minus_tap(kind, k))];
  }
}

// Replaces w [9] by the weights of the gradient of the input, a stencil over dy with the window rotated by
// 180 degrees. The 3x3 kinds become a plain kernel; radial stays a sum of differences.
template <PdcKind kind, typename A>
FRD_HD inline void input_grad_weights(A* w, A theta) {
  A v[kPdcWeights];
  if constexpr (kind == PdcKind::radial) {
    v[0] = w[0];
    for (int k = 1; k < kPdcWeights; ++k) v[k] = w[kPdcWeights - k];
  } else {
    A plain[kPdcWeights];
    transform<kind>(w, theta, plain);
    for (int k = 0; k < kPdcWeights; ++k) v[k] = plain[kPdcWeights - 1 - k];
  }
  for (int k = 0; k < kPdcWeights; ++k) w[k] = v[k];
}

FRD_HD inline double magnitude(double v) { return v < 0 ? -v : v; }
FRD_HD inline double larger(double a, double b) { return a > b ? a : b; }
// Rounds half away from zero. Not through an integer, which could overflow: 0 is 2^100 of its own ulps away
// from a typical tap.
FRD_HD inline double nearest(double v) { return trunc(v < 0 ? v - 0.5 : v + 0.5); }

// Distance to the next 16-bit value away from zero, which has the next larger bit pattern.
template <typename T>
FRD_HD inline double spacing(T v) {
  return magnitude(static_cast<double>(load(T{static_cast<uint16_t>(v.bits + 1)})) -
                   static_cast<double>(load(v)));
}

// Rounds v [n] to a 16-bit type T so that the taps sum to `target`. Rounding each tap on its own would leave
// a residue of about one ulp, which multiplies the mean of the input (a DC leak). Greedy: each step moves the
// tap that leaves the smallest residue, by whole ulps; no tap ends more than one and a half ulps of the
// largest tap away from v.
template <int n, typename T>
FRD_HD inline void round_to_sum(const float* v, double target, T* out) {
  constexpr int kMaxMoves = 9;
  double residue = -target;
  double limit = 0;
  for (int i = 0; i < n; ++i) {
    store(out[i], v[i]);
    residue += load(out[i]);
    limit = larger(limit, spacing(out[i]));
  }
  // Infinite or NaN taps cannot be balanced.
  if (!(residue - residue == 0)) return;
  for (int count = 0; count < kMaxMoves && residue != 0; ++count) {
    double best = residue;
    int move = -1;
    T moved_to{};
    // Unrolled on a GPU, so that v stays in registers.
    FRD_UNROLL
    for (int i = 0; i < n; ++i) {
      const double now = load(out[i]);
      const double ulp = spacing(out[i]);
      double wanted = now - residue;
      if (wanted > v[i] + limit) wanted = v[i] + limit;
      if (wanted < v[i] - limit) wanted = v[i] - limit;
      T candidate;
      store(candidate, static_cast<float>(now + ulp * nearest((wanted - now) / ulp)));
      const double left = residue + (load(candidate) - now);
      if (magnitude(left) < magnitude(best)) {
        best = left;
        move = i;
        moved_to = candidate;
      }
    }
    if (move < 0) return;
    out[move] = moved_to;
    residue = best;
  }
}

// Rounds the plain kernel v [side * side] to its storage type; in 16 bits a difference keeps its sum.
template <PdcKind kind, typename T>
FRD_HD inline void round_taps(const compute_t<T>* v, double theta, T* out) {
  constexpr int n = kernel_side(kind) * kernel_side(kind);
  // The taps of a pure radial difference are opposite pairs, whose sum stays 0.
  const bool keeps_sum = kind == PdcKind::vanilla || (kind == PdcKind::radial && theta == 1);
  if (sizeof(T) == 2 && !keeps_sum) {
    // A pure difference sums to exactly zero, whatever float32 arithmetic made of it.
    double target = 0;
    if (theta != 1)
      for (int i = 0; i < n; ++i) target += v[i];
    if constexpr (sizeof(T) == 2) round_to_sum<n>(v, target, out);
  } else {
    for (int i = 0; i < n; ++i) store(out[i], v[i]);
  }
}

// Arguments of the weight transform on any device; a pair is one (output, input) channel.
struct PdcWeightArgs {
  // forward: w [pairs, 9]; transposed: gradient of the plain kernel [pairs, side * side]
  const void* in;
  // forward: v [pairs, side * side]; transposed: gradient of w [pairs, 9]
  void* out;
  DType in_dtype, out_dtype;
  PdcKind kind;
  double theta;
};

}  // namespace frd
