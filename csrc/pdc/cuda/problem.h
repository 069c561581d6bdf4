// A checked call of the difference convolution as its CUDA launchers take it.
#pragma once
#include "core/layout.h"
#include "pdc/cuda/launch.h"
#include "pdc/op.h"

namespace frd {

// x [B, C, H, W] in the layout `format`; weight [C, 1, 3, 3], contiguous
inline PdcProblem problem_of(const PdcGeometry& g, const Tensor& x, const Tensor& weight,
                             MemoryFormat format) {
  check_image_size("pdc2d", "x", x.size(1), g.y.in, g.x.in);
  check_image_size("pdc2d", "the output", x.size(1), g.y.out, g.x.out);
  FRD_CHECK_VALUE(x.size(0) < (int64_t{1} << 31) - 1, "pdc2d: x must have fewer than 2^31 - 1 images, got ",
                  x.size(0));
  PdcProblem p{};
  p.y = g.y;
  p.x = g.x;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.kind = g.kind;
  p.theta = g.theta;
  p.dtype = dtype_of(x, "x");
  p.channels_last = format == MemoryFormat::ChannelsLast;
  p.source = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  return p;
}

}  // namespace frd
