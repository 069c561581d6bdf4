// CUDA operators of the fused block: checks, memory, stream and registration.
#include "pdc_block/cuda/launch.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "core/cuda_device.h"
#include "core/cuda_launch.h"
#include "core/layout.h"
#include "pdc_block/op.h"

namespace frd {
namespace {

using OptionalTensor = std::optional<Tensor>;

CudaLimits limits_of_device() {
  CudaLimits limits{};
  STD_CUDA_CHECK(device_attribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount));
  STD_CUDA_CHECK(device_attribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  STD_CUDA_CHECK(
      device_attribute(&limits.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  return limits;
}

cudaError_t launch(const BlockProductArgs& a, cudaStream_t stream) {
  const CudaLimits limits = limits_of_device();
  return a.dtype == DType::bf16  ? block_product_bf16(a, limits, stream)
         : a.dtype == DType::f16 ? block_product_f16(a, limits, stream)
                                 : block_product_f32(a, limits, stream);
}

cudaError_t launch(const PointGradArgs& a, cudaStream_t stream) {
  return a.dtype == DType::bf16  ? point_grad_bf16(a, stream)
         : a.dtype == DType::f16 ? point_grad_f16(a, stream)
                                 : point_grad_f32(a, stream);
}

// Checks for CUDA. x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1]
PdcBlockGeometry checked(const Tensor& x, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
                         const Tensor& point_weight, int64_t kind, double theta, const Ints& stride,
                         const Ints& dilation) {
  const PdcBlockGeometry g =
      checked_pdc_block(x, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  FRD_CHECK_VALUE(g.dtype != DType::f64,
                  "pdc_block: x must be float32, float16 or bfloat16 on CUDA, got float64");
  check_image_size("pdc_block", "x", g.channels, g.height, g.width);
  check_image_size("pdc_block", "the output", g.out_channels, g.out_height, g.out_width);
  return g;
}

// Arguments of the forward product, without its tensors.
BlockProductArgs product_of(const PdcBlockGeometry& g) {
  BlockProductArgs a{};
  a.dtype = g.dtype;
  a.channels_last = g.channels_last;
  a.kind = g.kind;
  a.pure = g.pure;
  a.theta = static_cast<float>(g.theta);
  a.batch = g.batch;
  a.channels = static_cast<int>(g.channels);
  a.out_channels = static_cast<int>(g.out_channels);
  a.height = static_cast<int>(g.height);
  a.width = static_cast<int>(g.width);
  a.out_height = static_cast<int>(g.out_height);
  a.out_width = static_cast<int>(g.out_width);
  // All strides and dilations beyond the size of the image lead outside it, so that int is enough.
  a.stride_y = static_cast<int>(std::min(g.stride_y, g.height));
  a.stride_x = static_cast<int>(std::min(g.stride_x, g.width));
  a.dilation_y = static_cast<int>(std::min(g.dilation_y, g.height));
  a.dilation_x = static_cast<int>(std::min(g.dilation_x, g.width));
  const bool plain = g.stride_y == 1 && g.stride_x == 1 && g.dilation_y == 1 && g.dilation_x == 1 &&
                     (g.pure || g.kind == PdcKind::vanilla);
  constexpr std::array<Prologue, 4> kTiled{Prologue::vanilla, Prologue::central, Prologue::angular,
                                           Prologue::radial};
  a.prologue = plain ? kTiled[static_cast<size_t>(g.kind)] : Prologue::gather;
  return a;
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(in_layout(*t)) : std::nullopt;
}
const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1], point_bias [Co],
// residual [B, Co, Ho, Wo] -> [B, Co, Ho, Wo]
Tensor pdc_block(const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
                 const Tensor& point_weight, const OptionalTensor& point_bias,
                 const OptionalTensor& residual_, int64_t kind, double theta, const Ints& stride,
                 const Ints& dilation) {
  const CudaScope scope(x_);
  const PdcBlockGeometry g = checked(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  check_point_bias(g, point_bias, x_);
  const Tensor x = in_layout(x_, format_of(g));
  const Tensor stencil = in_layout(pdc_weight);
  const Tensor point = in_layout(point_weight);
  const OptionalTensor stencil_bias = contiguous(pdc_bias);
  const OptionalTensor bias = contiguous(point_bias);
  const OptionalTensor residual =
      residual_ ? OptionalTensor(checked_images(g, "residual", *residual_, x, g.out_channels)) : std::nullopt;
  Tensor out = empty_images(x, g.out_channels, g.out_height, g.out_width, format_of(g));
  if (g.batch == 0) return out;
  BlockProductArgs a = product_of(g);
  a.x = x.const_data_ptr();
  a.stencil = stencil.const_data_ptr();
  a.point = point.const_data_ptr();
  a.stencil_bias = data_of(stencil_bias);
  a.point_bias = data_of(bias);
  a.residual = data_of(residual);
  a.out = out.mutable_data_ptr();
  STD_CUDA_CHECK(launch(a, scope.stream()));
  return out;
}

using torch::stable::detail::from;
using torch::stable::detail::to;

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

// Calls the operator for the gradients of the difference convolution. grad [B, C, Ho, Wo], x [B, C, H, W],
// weight [C, 1, 3, 3] -> dx, dw, db
std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, int64_t kind, double theta,
                                                            const Ints& stride, const Ints& padding,
                                                            const Ints& dilation) {
  std::array<StableIValue, 10> stack{from(grad),   from(x),       from(weight),   from(kind), from(theta),
                                     from(stride), from(padding), from(dilation), from(true), from(true)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(FRD_OP("pdc2d_depthwise_backward"), "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
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
// dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1], d_point_bias [Co]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pdc_block_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
    const Tensor& point_weight, int64_t kind, double theta, const Ints& stride, const Ints& dilation) {
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
  return {dx, d_pdc, d_pdc_bias, d_point, d_point_bias};
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) {
  m.impl("pdc_block", TORCH_BOX(&frd::pdc_block));
  m.impl("pdc_block_backward", TORCH_BOX(&frd::pdc_block_backward));
}
