#include "pdc/pdc_weight_cuda.h"

#include "core/cuda_launch.h"
#include "pdc/pdc_weight_op.h"

namespace frd {
namespace {

// weight [O, I, 3, 3] -> [O, I, side, side]
Tensor pdc_weight(const Tensor& weight, int64_t kind, double theta, ScalarType dtype) {
  CudaScope scope(weight);
  PdcWeightLaunch launch = prepare_pdc_weight(weight, kind, theta, dtype, false);
  STD_CUDA_CHECK(pdc_weight_forward_cuda(launch.args, launch.pairs, scope.stream()));
  return launch.out;
}

// grad [O, I, side, side] -> [O, I, 3, 3]
Tensor pdc_weight_backward(const Tensor& grad, int64_t kind, double theta, ScalarType dtype) {
  CudaScope scope(grad);
  PdcWeightLaunch launch = prepare_pdc_weight(grad, kind, theta, dtype, true);
  STD_CUDA_CHECK(pdc_weight_transposed_cuda(launch.args, launch.pairs, scope.stream()));
  return launch.out;
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) {
  m.impl("pdc_weight", TORCH_BOX(&frd::pdc_weight));
  m.impl("pdc_weight_backward", TORCH_BOX(&frd::pdc_weight_backward));
}
