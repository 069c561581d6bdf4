// CPU kernels of the depthwise pixel difference convolution and of its weight transform:
// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]); dx by the same kernels over dy;
// dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy.
#pragma once
#include "core/isa.h"
#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {

// Rows of a packed weight: the nine weights, then the bias.
constexpr int kPdcRows = kPdcWeights + 1;

// Images are NCHW or channels_last as the kernel that takes them. A below is the compute type.
struct PdcStencil {
  PdcAxis y, x;
  int64_t batch, channels;
  // Row stride of the packed weights: channels, rounded up so that whole vectors can be read.
  int64_t pitch;
  PdcKind kind;
  // theta == 1: the term x - x is skipped.
  bool pure;
  double theta;
  DType dtype;
  const void* source;   // [B, C, y.in, x.in] or [B, y.in, x.in, C]
  const void* weights;  // A [10, pitch]
  void* out;            // [B, C, y.out, x.out] or [B, y.out, x.out, C]
  const void* grad;     // dy, of the shape of out
  void* sums;           // A; NCHW: [strips, 10]; channels_last: [parts, 10, pitch], zeroed by the caller
};

// stencil_* read source and weights and write out. weight_grad_* read source and grad and write partial sums
// of dw and db. NCHW work is cut into strips, runs of rows of one plane; channels_last work into runs of rows
// of one image. Results do not depend on how strips and rows are shared out among threads.
struct PdcKernels {
  // Strips per plane, so that one fits the cache.
  int64_t (*strips)(const PdcStencil& s);
  // Elements of A that the scratch of a strip takes.
  int64_t (*strip_elements)(const PdcStencil& s, int64_t strips);
  // NCHW, strips [first, last) of all planes; scratch [strip_elements], zeroed before its first strip.
  void (*stencil_strips)(const PdcStencil& s, void* scratch, int64_t strips, int64_t first, int64_t last);
  void (*weight_grad_strips)(const PdcStencil& s, void* scratch, int64_t strips, int64_t first, int64_t last);
  // channels_last, rows [begin, end) of out or grad of one image; zeros [C] in the dtype.
  void (*stencil_rows)(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end);
  void (*weight_grad_rows)(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end,
                           int64_t part);
};

// Pairs begin <= i < end of the weight transform.
struct PdcWeightKernels {
  void (*forward)(const PdcWeightArgs& args, int64_t begin, int64_t end);
  void (*transposed)(const PdcWeightArgs& args, int64_t begin, int64_t end);
};

}  // namespace frd

FRD_ISA_TABLE(PdcKernels, pdc_kernels)
FRD_ISA_TABLE(PdcWeightKernels, pdc_weight_kernels)
