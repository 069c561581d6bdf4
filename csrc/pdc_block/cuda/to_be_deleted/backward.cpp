// The first backward of the fused block on CUDA: its own kernels for the gradients of the 1x1 convolution.
#include "core/cuda_launch.h"
#include "pdc_block/cuda/op.h"
#include "pdc_block/cuda/to_be_deleted/point_grad.h"

namespace frd {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

cudaError_t launch(const PointGradArgs& a, cudaStream_t stream) {
  return a.dtype == DType::bf16  ? point_grad_bf16(a, stream)
         : a.dtype == DType::f16 ? point_grad_f16(a, stream)
                                 : point_grad_f32(a, stream);
}

// Calls the operator for the difference convolution: the backward pass computes the hidden values, before
// their ReLU, again. x [B, C, H, W], weight [C, 1, 3, 3], bias [C] -> [B, C, Ho, Wo]
Tensor pdc2d_depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t kind,
                       double theta, const Ints& stride, const Ints& padding, const Ints& dilation) {
  std::array<StableIValue, 8> stack{from(x),     from(weight), from(bias),    from(kind),
                                    from(theta), from(stride), from(padding), from(dilation)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(FRD_OP("pdc2d_depthwise"), "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// The gradient [B, C, Ho, Wo] of the stencil's output: the forward product with the transposed 1x1 weight and
// with grad instead of the hidden values, gated by the ReLU. grad [B, Co, Ho, Wo], hidden [B, C, Ho, Wo]
Tensor hidden_gradient(const PdcBlockGeometry& g, const Tensor& grad, const Tensor& hidden,
                       const Tensor& point_weight, cudaStream_t stream) {
  Tensor out = empty_images(hidden, g.channels, g.out_height, g.out_width, format_of(g));
  const Tensor transposed = in_layout(torch::stable::transpose(point_weight, 0, 1));
  BlockProductArgs a = product_of(g);
  a.prologue = Prologue::copy;
  a.channels = static_cast<int>(g.out_channels);
  a.out_channels = static_cast<int>(g.channels);
  a.height = a.out_height;
  a.width = a.out_width;
  a.x = grad.const_data_ptr();
  a.point = transposed.const_data_ptr();
  a.gate = hidden.const_data_ptr();
  a.out = out.mutable_data_ptr();
  STD_CUDA_CHECK(launch(a, stream));
  return out;
}

// grad [B, Co, Ho, Wo], hidden [B, C, Ho, Wo] -> d_point [Co, C, 1, 1], d_bias [Co]
void point_gradient(const PdcBlockGeometry& g, const Tensor& grad, const Tensor& hidden, Tensor& d_point,
                    Tensor& d_bias, cudaStream_t stream) {
  PointGradArgs a{};
  a.dtype = g.dtype;
  a.channels_last = g.channels_last;
  a.batch = g.batch;
  a.pixels = g.out_height * g.out_width;
  a.channels = static_cast<int>(g.channels);
  a.out_channels = static_cast<int>(g.out_channels);
  a.parts = point_grad_parts(a.batch, a.pixels);
  Tensor partial =
      torch::stable::new_empty(grad, {a.parts, g.out_channels * (g.channels + 1)}, ScalarType::Float);
  a.grad = grad.const_data_ptr();
  a.hidden = hidden.const_data_ptr();
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.d_point = d_point.mutable_data_ptr();
  a.d_bias = d_bias.mutable_data_ptr();
  STD_CUDA_CHECK(launch(a, stream));
}

// grad [B, Co, Ho, Wo], x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1] ->
// dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1], d_point_bias [Co] or, if not
// needed, [0]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pdc_block_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
    const Tensor& point_weight, int64_t kind, double theta, const Ints& stride, const Ints& dilation,
    bool need_point_bias) {
  const CudaScope scope(x_);
  const PdcBlockGeometry g = checked(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  const Tensor x = in_layout(x_, format_of(g));
  const Tensor grad = checked_images(g, "grad", grad_, x, g.out_channels);
  Tensor d_point = torch::stable::new_empty(x, {g.out_channels, g.channels, 1, 1});
  Tensor d_point_bias = torch::stable::new_empty(x, {g.out_channels});
  Tensor hidden_grad;
  if (g.batch == 0) {
    torch::stable::zero_(d_point);
    torch::stable::zero_(d_point_bias);
    hidden_grad = empty_images(x, g.channels, g.out_height, g.out_width, format_of(g));
  } else {
    const Tensor hidden = in_layout(
        pdc2d_depthwise(x, pdc_weight, pdc_bias, kind, theta, stride, dilation, dilation), format_of(g));
    point_gradient(g, grad, hidden, d_point, d_point_bias, scope.stream());
    hidden_grad = hidden_gradient(g, grad, hidden, point_weight, scope.stream());
  }
  auto [dx, d_pdc, d_pdc_bias] =
      pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, kind, theta, stride, dilation, dilation);
  if (!need_point_bias) d_point_bias = torch::stable::new_empty(x, {0});
  return {dx, d_pdc, d_pdc_bias, d_point, d_point_bias};
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) { m.impl("pdc_block_backward", TORCH_BOX(&frd::pdc_block_backward)); }
