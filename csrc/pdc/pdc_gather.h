// What the launchers tell the general CUDA kernels: any stride, any layout, any dtype.
#pragma once
#include "pdc/pdc_tiles.h"

namespace frd {

struct PdcGather {
  PdcAxis y, x;  // from source to out; those of the gradient of x are turned already
  Divisor insert_y, insert_x;
  int channels;
  bool pixels;          // channels_last
  PdcKind turned_from;  // of the weights, where out is dx
  bool turned, pure;    // pure: theta == 1
  double theta;
  Divisor inner, middle;  // of an output's index: pixels C, x.out; planes x.out, y.out; sums x.out, none
  int outputs;            // of an image: elements; sums: pixels
  Divisor chunks;         // blocks of an image; sums: units of an image
  int units, parts;       // sums: units of all images; block (part, group) takes part, part + parts, ...
  const void *source, *weight, *bias, *grad;  // bias may be null
  void* out;
  void* sums;  // compute type, [parts, 10, C]
};

}  // namespace frd
