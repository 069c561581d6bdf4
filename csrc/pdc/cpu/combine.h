// The arithmetic of one output position: differences first, then the weights.
#pragma once
#include "pdc/cpu/vec.h"
#include "pdc/taps.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Slots: where the pixels of a window stand in the array t. 3x3 kinds: the 9 pixels, row-major. Radial:
// weight k has its outer pixel in slot k and its inner one in slot 9 + k (9 is not used: the centre is slot
// 0).
constexpr int slots(PdcKind kind) { return kind == PdcKind::radial ? 2 * kPdcWeights : kPdcWeights; }

constexpr int minus_slot(PdcKind kind, int k) {
  if (kind == PdcKind::radial) return k == 0 ? 0 : kPdcWeights + k;
  return (minus_tap(kind, k).dy + 1) * 3 + minus_tap(kind, k).dx + 1;
}

// Offset of a slot from the centre.
constexpr Tap slot_tap(PdcKind kind, int slot) {
  if (kind != PdcKind::radial || slot < kPdcWeights) return plus_tap(kind, slot < kPdcWeights ? slot : 0);
  return minus_tap(kind, slot - kPdcWeights);
}

// x_plus - theta x_minus of weight k; zero = true where that is x - x, whatever x.
template <PdcKind kind, bool pure, int k>
struct Term {
  static constexpr int minus = kind == PdcKind::vanilla ? k : minus_slot(kind, k);
  static constexpr bool same = kind != PdcKind::vanilla && minus == k;
  static constexpr bool zero = pure && same;

  template <class V>
  FRD_INLINE V difference(const V* t, V theta) {
    if constexpr (kind == PdcKind::vanilla) return t[k];
    if constexpr (pure) return t[k] - t[minus];
    return t[k] - theta * t[minus];
  }
};

template <PdcKind kind, bool pure, int k, class V>
FRD_INLINE void add_term(V& acc, const V* t, const V* w, V theta) {
  if constexpr (!Term<kind, pure, k>::zero) acc += w[k] * Term<kind, pure, k>::difference(t, theta);
}

// y = bias + sum_k w_k (x_plus - theta x_minus). Two chains: one would wait for its own additions.
template <PdcKind kind, bool pure, class V>
FRD_INLINE V combine(const V* t, const V* w, V theta) {
  V even = w[kPdcWeights], odd{};
  add_term<kind, pure, 0>(even, t, w, theta);
  add_term<kind, pure, 1>(odd, t, w, theta);
  add_term<kind, pure, 2>(even, t, w, theta);
  add_term<kind, pure, 3>(odd, t, w, theta);
  add_term<kind, pure, 4>(even, t, w, theta);
  add_term<kind, pure, 5>(odd, t, w, theta);
  add_term<kind, pure, 6>(even, t, w, theta);
  add_term<kind, pure, 7>(odd, t, w, theta);
  add_term<kind, pure, 8>(even, t, w, theta);
  return even + odd;
}

template <PdcKind kind, bool pure, int k, class V>
FRD_INLINE void add_sum(V* sums, const V* t, V g, V theta) {
  if constexpr (!Term<kind, pure, k>::zero) sums[k] += g * Term<kind, pure, k>::difference(t, theta);
}

// dw_k += dy (x_plus - theta x_minus), db += dy.
template <PdcKind kind, bool pure, class V>
FRD_INLINE void correlate(V* sums, const V* t, V g, V theta) {
  add_sum<kind, pure, 0>(sums, t, g, theta);
  add_sum<kind, pure, 1>(sums, t, g, theta);
  add_sum<kind, pure, 2>(sums, t, g, theta);
  add_sum<kind, pure, 3>(sums, t, g, theta);
  add_sum<kind, pure, 4>(sums, t, g, theta);
  add_sum<kind, pure, 5>(sums, t, g, theta);
  add_sum<kind, pure, 6>(sums, t, g, theta);
  add_sum<kind, pure, 7>(sums, t, g, theta);
  add_sum<kind, pure, 8>(sums, t, g, theta);
  sums[kPdcWeights] += g;
}

// f(kind, pure) with compile-time constants, for a stencil's runtime ones.
template <PdcKind kind, bool pure>
struct Case {
  static constexpr PdcKind kKind = kind;
  static constexpr bool kPure = pure;
};
template <class F>
FRD_INLINE void with_case(PdcKind kind, bool pure, F f) {
  switch (kind) {
    case PdcKind::vanilla:
      return f(Case<PdcKind::vanilla, true>{});
    case PdcKind::central:
      return pure ? f(Case<PdcKind::central, true>{}) : f(Case<PdcKind::central, false>{});
    case PdcKind::angular:
      return pure ? f(Case<PdcKind::angular, true>{}) : f(Case<PdcKind::angular, false>{});
    case PdcKind::radial:
      return pure ? f(Case<PdcKind::radial, true>{}) : f(Case<PdcKind::radial, false>{});
  }
}
template <class F>
FRD_INLINE void with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
