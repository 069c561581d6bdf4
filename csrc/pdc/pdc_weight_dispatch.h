// Turns run-time dtypes and kinds into template arguments: f(In{}, Out{}, KindTag<kind>{}).
#pragma once
#include "pdc/pdc_taps.h"

namespace frd {

template <PdcKind k>
struct KindTag {
  static constexpr PdcKind value = k;
};

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

template <typename F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(f16{});
    case DType::bf16:
      return f(bf16{});
  }
}

}  // namespace frd
