// Shapes and options of a fused block, for the kernels of all devices.
#pragma once
#include "core/dtypes.h"
#include "pdc/taps.h"

namespace frd {

struct PdcBlockGeometry {
  DType dtype;
  PdcKind kind;
  // theta == 1.
  bool pure;
  double theta;
  bool channels_last;
  // x [B, C, H, W]
  int64_t batch, channels, height, width;
  // out [B, Co, Ho, Wo]
  int64_t out_channels, out_height, out_width;
  // The padding is the dilation.
  int64_t stride_y, stride_x, dilation_y, dilation_x;
};

}  // namespace frd
