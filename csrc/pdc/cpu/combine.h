// Arithmetic of one output position, or of a vector of them: first the difference, then the weight. Taking
// the difference first makes the result of constant input exactly zero.
#pragma once
#include "core/vec.h"
#include "pdc/taps.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Slots of a window t. 3x3 kinds: the 9 pixels, row-major. Radial: weight k has its outer pixel in slot k and
// its inner one in slot 9 + k; slot 9 is unused, as the centre is slot 0.
constexpr int slots(PdcKind kind) { return kind == PdcKind::radial ? 2 * kPdcWeights : kPdcWeights; }

constexpr int minus_slot(PdcKind kind, int k) {
  if (kind == PdcKind::radial) return k == 0 ? 0 : kPdcWeights + k;
  return (minus_tap(kind, k).dy + 1) * 3 + minus_tap(kind, k).dx + 1;
}

// Offset of a slot from the centre of the window.
constexpr Tap slot_tap(PdcKind kind, int slot) {
  if (kind != PdcKind::radial || slot < kPdcWeights) return plus_tap(kind, slot < kPdcWeights ? slot : 0);
  return minus_tap(kind, slot - kPdcWeights);
}

// The difference x[plus_k] - theta x[minus_k] of weight k; is_zero: it is x - x for every x.
template <PdcKind kind, bool pure, int k>
struct Term {
  static constexpr int minus = kind == PdcKind::vanilla ? k : minus_slot(kind, k);
  static constexpr bool unused = kind != PdcKind::vanilla && minus == k;
  static constexpr bool is_zero = pure && unused;

  template <class V>
  FRD_INLINE V difference(const V* t, V theta) {
    if constexpr (kind == PdcKind::vanilla) return t[k];
    if constexpr (pure) return t[k] - t[minus];
    return t[k] - theta * t[minus];
  }
};

template <PdcKind kind, bool pure, int k, class V>
FRD_INLINE void add_product(V& sum, const V* t, const V* w, V theta) {
  if constexpr (!Term<kind, pure, k>::is_zero) sum += w[k] * Term<kind, pure, k>::difference(t, theta);
}

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]); w [10] ends in the bias. Two accumulators, as the
// additions of a single one would wait for each other.
template <PdcKind kind, bool pure, class V>
FRD_INLINE V pdc_combine(const V* t, const V* w, V theta) {
  V even = w[kPdcWeights], odd{};
  add_product<kind, pure, 0>(even, t, w, theta);
  add_product<kind, pure, 1>(odd, t, w, theta);
  add_product<kind, pure, 2>(even, t, w, theta);
  add_product<kind, pure, 3>(odd, t, w, theta);
  add_product<kind, pure, 4>(even, t, w, theta);
  add_product<kind, pure, 5>(odd, t, w, theta);
  add_product<kind, pure, 6>(even, t, w, theta);
  add_product<kind, pure, 7>(odd, t, w, theta);
  add_product<kind, pure, 8>(even, t, w, theta);
  return even + odd;
}

template <PdcKind kind, bool pure, int k, class V>
FRD_INLINE void add_weight_grad(V* sums, const V* t, V dy, V theta) {
  if constexpr (!Term<kind, pure, k>::is_zero) sums[k] += dy * Term<kind, pure, k>::difference(t, theta);
}

// dw_k += dy (x[plus_k] - theta x[minus_k]), db += dy; sums [10] ends in db.
template <PdcKind kind, bool pure, class V>
FRD_INLINE void pdc_correlate(V* sums, const V* t, V dy, V theta) {
  add_weight_grad<kind, pure, 0>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 1>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 2>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 3>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 4>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 5>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 6>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 7>(sums, t, dy, theta);
  add_weight_grad<kind, pure, 8>(sums, t, dy, theta);
  sums[kPdcWeights] += dy;
}

// Calls f(Case<kind, pure>{}), so that both are compile-time constants in f.
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
