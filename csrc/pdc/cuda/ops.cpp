// CUDA operators of the pixel difference convolution: checks, memory, stream and registration.
#include "pdc/cuda/problem.h"

#include <tuple>

#include "core/cuda_launch.h"

namespace frd {
namespace {

// x [B, C, H, W], weight [C, 1, 3, 3], bias [C] -> y [B, C, Ho, Wo]
Tensor pdc2d_depthwise(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
                       int64_t kind, double theta, const Ints& stride, const Ints& padding,
                       const Ints& dilation) {
  const CudaScope scope(x_);
  const PdcGeometry g = checked_pdc(x_, weight_, bias_, kind, theta, stride, padding, dilation);
  const MemoryFormat format = layout_of(x_);
  const Tensor x = in_layout(x_, format);
  const Tensor weight = in_layout(weight_);
  const std::optional<Tensor> bias = bias_ ? std::optional(in_layout(*bias_)) : std::nullopt;
  PdcProblem p = problem_of(g, x, weight, format);
  Tensor y = empty_images(x, p.channels, g.y.out, g.x.out, format);
  if (p.batch == 0 || p.channels == 0) return y;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = y.mutable_data_ptr();
  STD_CUDA_CHECK(pdc_forward_cuda(p, scope.stream()));
  return y;
}

// grad [B, C, Ho, Wo], x [B, C, H, W], weight [C, 1, 3, 3] -> dx [B, C, H, W], dw [C, 1, 3, 3], db [C]; each
// that is not needed is [0]
std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad_, const Tensor& x_,
                                                            const Tensor& weight_, int64_t kind, double theta,
                                                            const Ints& stride, const Ints& padding,
                                                            const Ints& dilation, bool need_dx,
                                                            bool need_dw) {
  const CudaScope scope(x_);
  const PdcGeometry g = checked_pdc(x_, weight_, std::nullopt, kind, theta, stride, padding, dilation);
  check_pdc_grad(g, grad_, x_);
  const MemoryFormat format = layout_of(x_);
  const Tensor x = in_layout(x_, format);
  const Tensor grad = in_layout(grad_, format);
  const Tensor weight = in_layout(weight_);
  PdcProblem p = problem_of(g, x, weight, format);
  Tensor dx =
      need_dx ? empty_images(x, p.channels, g.y.in, g.x.in, format) : torch::stable::new_empty(x, {0});
  const bool empty = p.batch == 0 || p.channels == 0;
  const auto new_output = [&](std::vector<int64_t> size) {
    return empty ? torch::stable::new_zeros(weight, size) : torch::stable::new_empty(weight, size);
  };
  Tensor dw = need_dw ? new_output({p.channels, 1, 3, 3}) : torch::stable::new_empty(weight, {0});
  Tensor db = new_output({need_dw ? p.channels : 0});
  if (empty || !(need_dx || need_dw)) return {dx, dw, db};

  p.grad = grad.const_data_ptr();
  p.out = need_dx ? dx.mutable_data_ptr() : nullptr;
  Tensor sums = dw;
  if (need_dw) {
    const ScalarType compute = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
    sums = torch::stable::new_empty(weight, {pdc_parts_cuda(p), 10, p.channels}, compute);
    p.dw = dw.mutable_data_ptr();
    p.db = db.mutable_data_ptr();
    p.sums = sums.mutable_data_ptr();
  }
  STD_CUDA_CHECK(pdc_backward_cuda(p, scope.stream()));
  return {dx, dw, db};
}

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
  m.impl("pdc2d_depthwise", TORCH_BOX(&frd::pdc2d_depthwise));
  m.impl("pdc2d_depthwise_backward", TORCH_BOX(&frd::pdc2d_depthwise_backward));
  m.impl("pdc_weight", TORCH_BOX(&frd::pdc_weight));
  m.impl("pdc_weight_backward", TORCH_BOX(&frd::pdc_weight_backward));
}
