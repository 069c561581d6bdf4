// Selects the instantiation of a kernel by kind, theta == 1 and dtype.
#include "pdc/cpu/kernel.h"

#include "pdc/cpu/channels_last.h"
#include "pdc/cpu/nchw.h"

namespace frd {
namespace FRD_ISA {
namespace {

template <class F>
FRD_INLINE void dispatch(const PdcStencil& s, F f) {
  with_element(s.dtype,
               [&](auto element) { with_case(s.kind, s.pure, [&](auto which) { f(which, element); }); });
}

int64_t strips(const PdcStencil& s) {
  return s.dtype == DType::f64 ? strips_of<double>(s) : strips_of<float>(s);
}

int64_t strip_elements(const PdcStencil& s, int64_t strips_per_plane) {
  return s.dtype == DType::f64 ? strip_elements_of<double>(s, strips_per_plane)
                               : strip_elements_of<float>(s, strips_per_plane);
}

void run_stencil_strips(const PdcStencil& s, void* scratch, int64_t strips_per_plane, int64_t first,
                        int64_t last) {
  dispatch(s, [&](auto which, auto element) {
    stencil_strips<decltype(which), decltype(element)>(s, scratch, strips_per_plane, first, last);
  });
}

void run_weight_grad_strips(const PdcStencil& s, void* scratch, int64_t strips_per_plane, int64_t first,
                            int64_t last) {
  dispatch(s, [&](auto which, auto element) {
    weight_grad_strips<decltype(which), decltype(element)>(s, scratch, strips_per_plane, first, last);
  });
}

void run_stencil_rows(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end) {
  dispatch(s, [&](auto which, auto element) {
    stencil_rows<decltype(which), decltype(element)>(s, zeros, image, begin, end);
  });
}

void run_weight_grad_rows(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end,
                          int64_t part) {
  dispatch(s, [&](auto which, auto element) {
    weight_grad_rows<decltype(which), decltype(element)>(s, zeros, image, begin, end, part);
  });
}

}  // namespace

const PdcKernels& pdc_kernels() {
  static const PdcKernels table{
      strips,           strip_elements,      run_stencil_strips, run_weight_grad_strips,
      run_stencil_rows, run_weight_grad_rows};
  return table;
}

}  // namespace FRD_ISA
}  // namespace frd
