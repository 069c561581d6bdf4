// Pixel difference convolution, stated once for CPU and CUDA:
// y(p) = sum_k w_k (x(p + plus_k) - theta x(p + minus_k)).
#pragma once
#include <cstdint>

#include "core/dtypes.h"

namespace frd {

enum class PdcKind : int { vanilla = 0, central = 1, angular = 2, radial = 3 };

constexpr int kPdcWeights = 9;
// Offset that stands for no tap: vanilla subtracts nothing.
constexpr int kNoTap = 127;

// Offset of a tap from the output position, in steps of the dilation.
struct Tap {
  int dy, dx;
};

// Where weight k (row-major index into the 3x3 parameter) reads its minuend.
FRD_HD constexpr Tap plus_tap(PdcKind kind, int k) {
  if (kind == PdcKind::radial) {
    // PiDiNet's order: weight 0 is the centre, weights 1..8 the outer ring of a 5x5 window row by row.
    constexpr int8_t dy[9] = {0, -2, -2, -2, 0, 0, 2, 2, 2};
    constexpr int8_t dx[9] = {0, -2, 0, 2, -2, 2, -2, 0, 2};
    return {dy[k], dx[k]};
  }
  return {k / 3 - 1, k % 3 - 1};
}

// Where weight k reads its subtrahend. Angular: the next neighbour clockwise on the ring 0 1 2 5 8 7 6 3.
FRD_HD constexpr Tap minus_tap(PdcKind kind, int k) {
  switch (kind) {
    case PdcKind::central:
      return {0, 0};
    case PdcKind::angular: {
      constexpr int8_t next[9] = {1, 2, 5, 0, 4, 8, 3, 6, 7};
      return {next[k] / 3 - 1, next[k] % 3 - 1};
    }
    case PdcKind::radial:
      return {plus_tap(kind, k).dy / 2, plus_tap(kind, k).dx / 2};
    default:
      return {kNoTap, kNoTap};
  }
}

// Side length of the equivalent plain kernel, and the index of a tap in it.
FRD_HD constexpr int kernel_side(PdcKind kind) { return kind == PdcKind::radial ? 5 : 3; }
FRD_HD constexpr int tap_index(PdcKind kind, Tap t) {
  const int side = kernel_side(kind);
  return (t.dy + side / 2) * side + t.dx + side / 2;
}

// One axis of a stencil from `in` to `out` elements. Output q reads, at offset o from the first tap of its
// window, input element (q * stride + o - padding) / upsample if that is an integer within the input, else 0.
// The forward has upsample 1. The gradient of x has stride 1 and upsample = the forward's stride: it reads dy
// with zeros inserted between its elements, like a transposed convolution.
struct PdcAxis {
  int64_t in, out, padding, stride, upsample, dilation;
};

// The axis of the gradient of x, which is a stencil over dy with the window rotated by 180 degrees.
inline PdcAxis input_grad_axis(const PdcAxis& a, PdcKind kind) {
  const int64_t extent = 2 * (kernel_side(kind) / 2) * a.dilation;
  return {a.out, a.in, extent - a.padding, 1, a.stride, a.dilation};
}

template <PdcKind k>
struct KindTag {
  static constexpr PdcKind value = k;
};

// Calls f(KindTag<kind>{}), so that the kind is a compile-time constant in f.
template <typename F>
inline void with_kind(PdcKind kind, F f) {
  switch (kind) {
    case PdcKind::vanilla:
      return f(KindTag<PdcKind::vanilla>{});
    case PdcKind::central:
      return f(KindTag<PdcKind::central>{});
    case PdcKind::angular:
      return f(KindTag<PdcKind::angular>{});
    case PdcKind::radial:
      return f(KindTag<PdcKind::radial>{});
  }
}

}  // namespace frd
