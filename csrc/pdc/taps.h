// Pixel difference convolution, stated once for CPU and CUDA: y(p) = sum_k w_k (x(p + plus_k) - theta x(p +
// minus_k)).
#pragma once
#include <cstdint>

#include "core/dtypes.h"

namespace frd {

enum class PdcKind : int { vanilla = 0, central = 1, angular = 2, radial = 3 };

constexpr int kPdcWeights = 9;
constexpr int kNoTap = 127;  // vanilla subtracts nothing

// Offset of a tap from the output position, in steps of the dilation.
struct Tap {
  int dy, dx;
};

// Where weight k (row-major index into the 3x3 parameter) reads its minuend.
FRD_HD constexpr Tap plus_tap(PdcKind kind, int k) {
  if (kind == PdcKind::radial) {
    // PiDiNet's order: weights 1..8 walk the outer ring of a 5x5 window row by row, weight 0 sits in the
    // centre.
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

// Side of the equivalent plain kernel, and the index of a tap in it.
FRD_HD constexpr int kernel_side(PdcKind kind) { return kind == PdcKind::radial ? 5 : 3; }
FRD_HD constexpr int tap_index(PdcKind kind, Tap t) {
  const int side = kernel_side(kind);
  return (t.dy + side / 2) * side + t.dx + side / 2;
}

// Output q reads, at offset o from the first tap of its window, element (q * step + o - lead) / insert of the
// source where that is whole and inside, else 0. Forward has insert 1; the gradient of x has step 1 and
// insert = stride: it reads dy with zeros between.
struct PdcAxis {
  int64_t source, out, lead, step, insert, dilation;
};

// The axis of the gradient of x, a stencil over dy with the window turned by 180 degrees.
inline PdcAxis turned(const PdcAxis& a, PdcKind kind) {
  const int64_t span = 2 * (kernel_side(kind) / 2) * a.dilation;
  return {a.out, a.source, span - a.lead, 1, a.step, a.dilation};
}

template <PdcKind k>
struct KindTag {
  static constexpr PdcKind value = k;
};

// f(KindTag<kind>{}).
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
