// CPU kernels of the fused block: stencil -> ReLU into a cache-resident tile, then the 1x1 as a product of
// tiles.
#pragma once
#include "core/isa.h"
#include "pdc_block/geometry.h"

namespace frd {

constexpr int kStencilRow = kPdcWeights + 1;  // of the prepared stencil: nine weights, then the bias

// A is the compute type: double for double, else float. "Planes" is NCHW, "pixels" is channels_last.
struct PdcBlockArgs : PdcBlockGeometry {
  // A tile is tile_rows whole rows of the output, or (tile_rows 1) tile_columns of a row: contiguous pixels.
  int64_t tile_rows, tile_columns, tiles_y, tiles_x;
  const void* x;           // [B, C, H, W]
  const void* stencil;     // A; planes [C, 10], pixels [10, C]
  const void* point;       // A [Co, C]; pixels: packed, forward [C, Co] (its transpose), backward [Co, C]
  const void* point_bias;  // A [Co] or null
  const void* residual;    // [B, Co, Ho, Wo] or null
  void* out;               // forward: [B, Co, Ho, Wo]
  const void* grad;        // backward: [B, Co, Ho, Wo]
  void* hidden_grad;       // backward: the gradient of the stencil's output, [B, C, Ho, Wo]
};

struct PdcBlockKernels {
  int64_t (*forward_scratch)(const PdcBlockArgs& a);   // elements of A
  int64_t (*backward_scratch)(const PdcBlockArgs& a);  // elements of A
  // tiles [begin, end); scratch aligned to 64 bytes
  void (*forward)(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end);
  // the same, and the sums over these tiles: sums A [Co, C] (of the 1x1 weight), then [Co] (of its bias)
  void (*backward)(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end, void* sums);
};

}  // namespace frd

FRD_ISA_TABLE(PdcBlockKernels, pdc_block_kernels)
