// The transform of a 3x3 parameter into the equivalent plain kernel, its transpose, and rounding to 16 bit
// that keeps their sum.
#pragma once
#include <math.h>

#include "core/dtypes.h"
#include "pdc/taps.h"

namespace frd {

// v[side * side] = the plain kernel that equals the difference convolution by w[9].
template <PdcKind kind, typename A>
FRD_HD inline void transform(const A* w, A theta, A* v) {
  constexpr int taps = kernel_side(kind) * kernel_side(kind);
  for (int i = 0; i < taps; ++i) v[i] = A(0);
  for (int k = 0; k < kPdcWeights; ++k) v[tap_index(kind, plus_tap(kind, k))] += w[k];
  if constexpr (kind != PdcKind::vanilla)
    for (int k = 0; k < kPdcWeights; ++k) v[tap_index(kind, minus_tap(kind, k))] -= theta * w[k];
}

// w[9] = transposed transform of v: the gradient of the parameter from the gradient of the plain kernel.
template <PdcKind kind, typename A>
FRD_HD inline void transform_transposed(const A* v, A theta, A* w) {
  for (int k = 0; k < kPdcWeights; ++k) {
    w[k] = v[tap_index(kind, plus_tap(kind, k))];
    if constexpr (kind != PdcKind::vanilla) w[k] -= theta * v[tap_index(kind, minus_tap(kind, k))];
  }
}

// w[9] in place -> the weights of the gradient of the input, a stencil over dy with the window turned by 180
// degrees. The 3x3 kinds become plain; radial stays a sum of differences.
template <PdcKind kind, typename A>
FRD_HD inline void turn(A* w, A theta) {
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
// Half away from zero. Not by way of an integer: 0 is 2^100 of its own ulps away from a tap.
FRD_HD inline double nearest(double v) { return trunc(v < 0 ? v - 0.5 : v + 0.5); }

// Distance to the next 16-bit value away from zero; the bits of a float order like sign and magnitude.
template <typename T>
FRD_HD inline double spacing(T v) {
  return magnitude(static_cast<double>(load(T{static_cast<uint16_t>(v.bits + 1)})) -
                   static_cast<double>(load(v)));
}

// Rounds v[n] to a 16-bit type T so that the taps sum to `target`: independent rounding leaves a residue of
// about an ulp, which multiplies the mean of the input (a DC leak). One tap at a time moves by whole ulps,
// the one that leaves the smallest residue first, and none strays further than one and a half ulps of the
// largest tap.
template <int n, typename T>
FRD_HD inline void round_to_sum(const float* v, double target, T* out) {
  constexpr int kMostMoves = 9;
  double residue = -target, limit = 0;
  for (int i = 0; i < n; ++i) {
    store(out[i], v[i]);
    residue += load(out[i]);
    limit = larger(limit, spacing(out[i]));
  }
  if (!(residue - residue == 0)) return;  // infinite or NaN taps: nothing to balance
  for (int count = 0; count < kMostMoves && residue != 0; ++count) {
    double best = residue;
    int move = -1;
    T moved_to{};
    FRD_UNROLL  // v stays in registers on a GPU
        for (int i = 0; i < n; ++i) {
      const double now = load(out[i]), ulp = spacing(out[i]);
      double wanted = now - residue;
      if (wanted > v[i] + limit) wanted = v[i] + limit;
      if (wanted < v[i] - limit) wanted = v[i] - limit;
      T candidate;
      store(candidate, static_cast<float>(now + ulp * nearest((wanted - now) / ulp)));
      const double left = residue + (load(candidate) - now);
      if (magnitude(left) < magnitude(best)) best = left, move = i, moved_to = candidate;
    }
    if (move < 0) return;
    out[move] = moved_to;
    residue = best;
  }
}

// v[n] -> out[n] in the storage type: balanced where a difference convolution is rounded to 16 bit.
template <PdcKind kind, typename T>
FRD_HD inline void round_taps(const compute_t<T>* v, double theta, T* out) {
  constexpr int n = kernel_side(kind) * kernel_side(kind);
  if constexpr (sizeof(T) == 2 && kind != PdcKind::vanilla) {
    double target = 0;  // of a pure difference exactly, whatever float32 made of it
    if (theta != 1)
      for (int i = 0; i < n; ++i) target += v[i];
    round_to_sum<n>(v, target, out);
  } else {
    for (int i = 0; i < n; ++i) store(out[i], v[i]);
  }
}

// One transform of all [3, 3] slices, for the kernels of every device.
struct PdcWeightArgs {
  const void* in;  // forward: w [pairs, 9]; transposed: gradient of the plain kernel [pairs, side * side]
  void* out;       // forward: v [pairs, side * side]; transposed: gradient of w [pairs, 9]
  DType in_dtype, out_dtype;
  PdcKind kind;
  double theta;
};

}  // namespace frd
