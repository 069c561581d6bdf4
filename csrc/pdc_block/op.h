// Argument checks of the fused block, shared by the CPU and CUDA operators.
#pragma once
#include "core/layout.h"
#include "pdc/op.h"
#include "pdc_block/geometry.h"

namespace frd {

// x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1]
inline PdcBlockGeometry checked_pdc_block(const Tensor& x, const Tensor& pdc_weight,
                                          const std::optional<Tensor>& pdc_bias, const Tensor& point_weight,
                                          int64_t kind, double theta, const Ints& stride,
                                          const Ints& dilation) {
  FRD_CHECK_VALUE(kind >= 0 && kind <= 3, "pdc_block: kind must be 0 (vanilla) to 3 (radial), got ", kind);
  FRD_CHECK_VALUE(x.dim() == 4 && x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1,
                  "pdc_block: x must be [B, C, H, W] with C, H, W at least 1, got ", x.dim(), "-D");
  const int64_t channels = x.size(1);
  FRD_CHECK_VALUE(pdc_weight.dim() == 4 && pdc_weight.size(0) == channels && pdc_weight.size(1) == 1 &&
                      pdc_weight.size(2) == 3 && pdc_weight.size(3) == 3,
                  "pdc_block: pdc_weight must be [", channels, ", 1, 3, 3], got ", pdc_weight.dim(),
                  "-D with first size ", pdc_weight.dim() ? pdc_weight.size(0) : 0);
  FRD_CHECK_VALUE(point_weight.dim() == 4 && point_weight.size(0) >= 1 && point_weight.size(1) == channels &&
                      point_weight.size(2) == 1 && point_weight.size(3) == 1,
                  "pdc_block: point_weight must be [Co, ", channels, ", 1, 1], got ", point_weight.dim(),
                  "-D with first size ", point_weight.dim() ? point_weight.size(0) : 0);
  FRD_CHECK_VALUE(!pdc_bias || (pdc_bias->dim() == 1 && pdc_bias->size(0) == channels),
                  "pdc_block: pdc_bias must be [", channels, "]");
  FRD_CHECK_VALUE(stride.size() == 2 && stride[0] >= 1 && stride[1] >= 1 && dilation.size() == 2 &&
                      dilation[0] >= 1 && dilation[1] >= 1,
                  "pdc_block: stride and dilation must be pairs of at least 1");
  for (const Tensor* t : {&pdc_weight, &point_weight, pdc_bias ? &*pdc_bias : &x})
    FRD_CHECK_VALUE(t->scalar_type() == x.scalar_type() && t->device() == x.device(),
                    "pdc_block: pdc_weight, pdc_bias and point_weight must have the dtype and device of x");
  PdcBlockGeometry a{};
  a.dtype = dtype_of(x, "x");
  a.kind = static_cast<PdcKind>(kind);
  a.pure = theta == 1;
  a.theta = theta;
  a.channels_last = layout_of(x) == MemoryFormat::ChannelsLast;
  a.batch = x.size(0);
  a.channels = channels;
  a.height = x.size(2);
  a.width = x.size(3);
  a.stride_y = stride[0];
  a.stride_x = stride[1];
  a.dilation_y = dilation[0];
  a.dilation_x = dilation[1];
  a.out_channels = point_weight.size(0);
  a.out_height = (a.height - 1) / a.stride_y + 1;
  a.out_width = (a.width - 1) / a.stride_x + 1;
  return a;
}

// point_bias [Co]
inline void check_point_bias(const PdcBlockGeometry& a, const std::optional<Tensor>& point_bias,
                             const Tensor& x) {
  FRD_CHECK_VALUE(
      !point_bias || (point_bias->dim() == 1 && point_bias->size(0) == a.out_channels &&
                      point_bias->scalar_type() == x.scalar_type() && point_bias->device() == x.device()),
      "pdc_block: point_bias must be [", a.out_channels, "] of the dtype and device of x");
}

// The layout of all images of the block.
inline MemoryFormat format_of(const PdcBlockGeometry& a) {
  return a.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Checks the argument t [B, channels, Ho, Wo] against x [B, C, H, W] and returns it dense in the layout of x.
inline Tensor checked_images(const PdcBlockGeometry& a, const char* name, const Tensor& t, const Tensor& x,
                             int64_t channels) {
  FRD_CHECK_VALUE(t.dim() == 4 && t.size(0) == a.batch && t.size(1) == channels &&
                      t.size(2) == a.out_height && t.size(3) == a.out_width,
                  "pdc_block: ", name, " must be [", a.batch, ", ", channels, ", ", a.out_height, ", ",
                  a.out_width, "], got ", t.dim(), "-D");
  FRD_CHECK_VALUE(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "pdc_block: ", name,
                  " must have the dtype and device of x");
  return in_layout(t, format_of(a));
}

}  // namespace frd
