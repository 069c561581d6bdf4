#include "pdc/pdc_weight_op.h"

namespace frd {
namespace {

constexpr int64_t kPairsPerTask = 4096;

// weight [O, I, 3, 3] -> [O, I, side, side]
Tensor pdc_weight(const Tensor& weight, int64_t kind, double theta, ScalarType dtype) {
  PdcWeightLaunch launch = prepare_pdc_weight(weight, kind, theta, dtype, false);
  torch::stable::parallel_for(0, launch.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    pdc_weight_kernels().forward(launch.args, begin, end);
  });
  return launch.out;
}

// grad [O, I, side, side] -> [O, I, 3, 3]
Tensor pdc_weight_backward(const Tensor& grad, int64_t kind, double theta, ScalarType dtype) {
  PdcWeightLaunch launch = prepare_pdc_weight(grad, kind, theta, dtype, true);
  torch::stable::parallel_for(0, launch.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    pdc_weight_kernels().transposed(launch.args, begin, end);
  });
  return launch.out;
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("pdc_weight", TORCH_BOX(&frd::pdc_weight));
  m.impl("pdc_weight_backward", TORCH_BOX(&frd::pdc_weight_backward));
}
