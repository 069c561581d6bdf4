// The sum of differences at one output position (or a vector of them), for whatever loads its taps.
#pragma once
#include "pdc/taps.h"

namespace frd {

template <PdcKind kind, bool pure, int k, class V, class Weight, class At>
static inline __attribute__((always_inline)) void add_pdc_terms(V& sum, V theta, const Weight& weight,
                                                                const At& at) {
  if constexpr (k < kPdcWeights) {
    constexpr Tap plus = plus_tap(kind, k), minus = minus_tap(kind, k);
    if constexpr (kind == PdcKind::vanilla) {
      sum += weight(k) * at(plus);
    } else if constexpr (!pure) {
      sum += weight(k) * (at(plus) - theta * at(minus));
    } else if constexpr (plus.dy != minus.dy || plus.dx != minus.dx) {  // else x - x: the unused weight
      sum += weight(k) * (at(plus) - at(minus));
    }
    add_pdc_terms<kind, pure, k + 1>(sum, theta, weight, at);
  }
}

// start + sum_k weight(k) (at(plus_k) - theta at(minus_k)), the difference first, k ascending; `pure`: theta
// is 1. V: float, double or a vector of them; weight(int) and at(Tap) give a V. With at(t) reading the
// gradient at -t this is also the gradient of the input (stride 1).
template <PdcKind kind, bool pure, class V, class Weight, class At>
static inline __attribute__((always_inline)) V pdc_sum(V start, V theta, const Weight& weight, const At& at) {
  add_pdc_terms<kind, pure, 0>(start, theta, weight, at);
  return start;
}

}  // namespace frd
