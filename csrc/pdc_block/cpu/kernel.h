// CPU kernels of the fused block, out = point relu(stencil(x)) (+ bias) (+ residual): the hidden values
// relu(stencil(x)) of a tile stay in the cache, and the 1x1 convolution is a GEMM over the tile.
#pragma once
#include "core/isa.h"
#include "pdc_block/geometry.h"

namespace frd {

// Values per channel of the prepared stencil: nine weights, then the bias.
constexpr int kStencilRow = kPdcWeights + 1;

// A below is the compute type: double for double, else float.
struct PdcBlockArgs : PdcBlockGeometry {
  // A tile is tile_rows whole rows of the output, or with tile_rows 1 tile_columns of a row: contiguous
  // pixels.
  int64_t tile_rows, tile_columns, tiles_y, tiles_x;
  const void* x;        // [B, C, H, W]
  const void* stencil;  // A; NCHW [C, 10], channels_last [10, C]
  // A; NCHW [Co, C]; channels_last packed for the GEMM, forward [C, Co] (the transpose), backward [Co, C].
  const void* point;
  const void* point_bias;  // A [Co] or null
  const void* residual;    // [B, Co, Ho, Wo] or null
  void* out;               // forward: [B, Co, Ho, Wo]
  const void* grad;        // backward: [B, Co, Ho, Wo]
  void* hidden_grad;       // backward: the gradient of the stencil's output, [B, C, Ho, Wo]
};

struct PdcBlockKernels {
  // Elements of A that the scratch takes.
  int64_t (*forward_scratch)(const PdcBlockArgs& a);
  int64_t (*backward_scratch)(const PdcBlockArgs& a);
  // Tiles [begin, end); scratch is aligned to 64 bytes.
  void (*forward)(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end);
  // hidden_grad of the tiles, and their sums of the gradient of the 1x1 weight, sums A [Co, C], and of its
  // bias [Co].
  void (*backward)(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end, void* sums);
};

}  // namespace frd

FRD_ISA_TABLE(PdcBlockKernels, pdc_block_kernels)
