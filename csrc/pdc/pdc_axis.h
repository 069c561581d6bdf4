// How the pixels of an output axis fall on those of the source, for the difference convolution and for the
// gradient of its input.
#pragma once
#include "pdc/pdc_taps.h"

namespace frd {

// Output q reads, at offset o from the first tap of its window, element (q * step + o - lead) / insert of the
// source where that is whole and inside, else 0. Forward has insert 1; the gradient of x has step 1 and
// insert = stride: it reads dy with zeros between.
struct PdcAxis {
  int64_t source, out, lead, step, insert, dilation;
};

// The axis of the gradient of x, a stencil over dy with the window turned by 180 degrees.
inline PdcAxis turned(const PdcAxis& a, PdcKind kind) {
  const int64_t span = 2 * (kernel_side(kind) / 2) * a.dilation;
  return {a.out, a.source, span - a.lead, 1, a.step, a.dilation};
}

}  // namespace frd
