// CPU kernels of the depthwise pixel difference convolution (y, and by the same code dx; and dw) and of the
// weight transform.
#pragma once
#include "core/isa.h"
#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {

constexpr int kPdcRows = kPdcWeights + 1;  // of a packed weight: the 9 weights, then the bias

struct PdcStencil {
  PdcAxis y, x;
  int64_t batch, channels;
  int64_t pitch;  // of the packed weights: channels, rounded up so that whole vectors can be read
  PdcKind kind;
  bool pure;  // theta == 1: the weight of x - x is skipped
  double theta;
  DType dtype;
  const void* source;   // planes: [B, C, source.y, source.x]; pixels: [B, source.y, source.x, C]
  const void* weights;  // compute type, [10, pitch]
  void* out;            // planes: [B, C, out.y, out.x]; pixels: [B, out.y, out.x, C]
  const void* grad;     // laid out as out
  void* sums;           // compute type; planes: [items, 10]; pixels: [items, 10, pitch], zeroed by the caller
};

// A stencil reads source and weights and writes out; sums read source and grad and write the parts of dw and
// db that belong to an item. An item of the planes is a strip of rows of a plane, one of the pixels a run of
// rows of an image; what is computed for it does not depend on the thread.
struct PdcKernels {
  int64_t (*strips)(const PdcStencil& s);  // per plane, so that a strip stays in cache
  int64_t (*strip_elements)(const PdcStencil& s, int64_t strips);  // of scratch in the compute type
  // items [first, last); scratch: strip_elements, zeroed by the caller before the first of its items
  void (*stencil_strips)(const PdcStencil& s, void* scratch, int64_t strips, int64_t first, int64_t last);
  void (*sums_strips)(const PdcStencil& s, void* scratch, int64_t strips, int64_t first, int64_t last);
  // zeros: [C] of the dtype; rows [begin, end) of out, or of grad
  void (*stencil_rows)(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end);
  void (*sums_rows)(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end,
                    int64_t item);
};

struct PdcWeightKernels {
  void (*forward)(const PdcWeightArgs& args, int64_t begin, int64_t end);     // pairs begin <= i < end
  void (*transposed)(const PdcWeightArgs& args, int64_t begin, int64_t end);  // likewise
};

}  // namespace frd

FRD_ISA_TABLE(PdcKernels, pdc_kernels)
FRD_ISA_TABLE(PdcWeightKernels, pdc_weight_kernels)
