// The forward CUDA operators of the fused block: memory, stream and registration.
#include "pdc_block/cuda/op.h"

namespace frd {
namespace {

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(in_layout(*t)) : std::nullopt;
}
const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1], point_bias [Co],
// residual [B, Co, Ho, Wo] -> [B, Co, Ho, Wo]
template <bool kNewerTiles>
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
  a.newer_tiles = kNewerTiles;
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

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) { m.impl("pdc_block", TORCH_BOX(&frd::pdc_block<false>)); }
FRD_CHAIN_LIBRARY(m) { m.impl("pdc_block", TORCH_BOX(&frd::pdc_block<true>)); }
