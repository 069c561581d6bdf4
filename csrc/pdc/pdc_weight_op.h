// Checks and allocation of the weight transform, shared by the CPU and the CUDA launcher.
#pragma once
#include "core/layout.h"
#include "core/stable.h"
#include "pdc/pdc_weight_kernel.h"

namespace frd {

struct PdcWeightLaunch {
  Tensor in, out;
  PdcWeightArgs args;
  int64_t pairs;
};

inline PdcKind checked_kind(int64_t kind) {
  FRD_CHECK_VALUE(kind >= 0 && kind <= 3, "frd: kind must be 0 (vanilla) to 3 (radial), got ", kind);
  return static_cast<PdcKind>(kind);
}

// tensor: forward [O, I, 3, 3]; transposed [O, I, side, side]
inline PdcWeightLaunch prepare_pdc_weight(const Tensor& tensor, int64_t kind_, double theta, ScalarType dtype,
                                          bool transposed) {
  const PdcKind kind = checked_kind(kind_);
  const int64_t side = kernel_side(kind), in_side = transposed ? side : 3, out_side = transposed ? 3 : side;
  FRD_CHECK_VALUE(tensor.dim() == 4 && tensor.size(2) == in_side && tensor.size(3) == in_side,
                  "frd: ", transposed ? "grad" : "weight", " must be [O, I, ", in_side, ", ", in_side,
                  "], got ", tensor.dim(), "-D with last size ",
                  tensor.dim() ? tensor.size(tensor.dim() - 1) : 0);
  Tensor in = in_layout(tensor);
  Tensor out = torch::stable::new_empty(in, {in.size(0), in.size(1), out_side, out_side}, dtype);
  PdcWeightArgs args{in.const_data_ptr(),
                     out.mutable_data_ptr(),
                     dtype_of(in, "weight"),
                     dtype_of(out, "dtype"),
                     kind,
                     theta};
  return {in, out, args, in.size(0) * in.size(1)};
}

}  // namespace frd
