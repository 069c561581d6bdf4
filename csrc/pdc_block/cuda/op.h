// What the CUDA operators of the fused block share: checks, arguments of the product, calls of other
// operators.
#pragma once
#include <algorithm>
#include <array>
#include <tuple>

#include "core/cuda_device.h"
#include "core/cuda_launch.h"
#include "core/layout.h"
#include "pdc_block/cuda/launch.h"
#include "pdc_block/op.h"

namespace frd {

using OptionalTensor = std::optional<Tensor>;

inline CudaLimits limits_of_device() {
  CudaLimits limits{};
  STD_CUDA_CHECK(device_attribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount));
  STD_CUDA_CHECK(device_attribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  STD_CUDA_CHECK(
      device_attribute(&limits.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  return limits;
}

inline cudaError_t launch(const BlockProductArgs& a, cudaStream_t stream) {
  const CudaLimits limits = limits_of_device();
  return a.dtype == DType::bf16  ? block_product_bf16(a, limits, stream)
         : a.dtype == DType::f16 ? block_product_f16(a, limits, stream)
                                 : block_product_f32(a, limits, stream);
}

// Checks for CUDA. x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1]
inline PdcBlockGeometry checked(const Tensor& x, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
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
inline BlockProductArgs product_of(const PdcBlockGeometry& g) {
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

// Calls the operator for the gradients of the difference convolution. grad [B, C, Ho, Wo], x [B, C, H, W],
// weight [C, 1, 3, 3] -> dx, dw, db
inline std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad, const Tensor& x,
                                                                   const Tensor& weight, int64_t kind,
                                                                   double theta, const Ints& stride,
                                                                   const Ints& padding,
                                                                   const Ints& dilation) {
  std::array<StableIValue, 10> stack{
      torch::stable::detail::from(grad),    torch::stable::detail::from(x),
      torch::stable::detail::from(weight),  torch::stable::detail::from(kind),
      torch::stable::detail::from(theta),   torch::stable::detail::from(stride),
      torch::stable::detail::from(padding), torch::stable::detail::from(dilation),
      torch::stable::detail::from(true),    torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(FRD_OP("pdc2d_depthwise_backward"), "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

}  // namespace frd
