// The shape of a fused block, for the kernels of every device.
#pragma once
#include "core/dtypes.h"
#include "pdc/taps.h"

namespace frd {

struct PdcBlockGeometry {
  DType dtype;
  PdcKind kind;
  bool pure;  // theta is 1
  double theta;
  bool channels_last;
  int64_t batch, channels, height, width;              // x [B, C, H, W]
  int64_t out_channels, out_height, out_width;         // out [B, Co, Ho, Wo]
  int64_t stride_y, stride_x, dilation_y, dilation_x;  // padding = dilation
};

}  // namespace frd
