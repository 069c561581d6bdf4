// Launchers of the fused block, without torch.
#pragma once
#include <cuda_runtime_api.h>

#include "pdc/taps.h"

namespace frd {

// How the left operand of the product, the hidden values [B, C, Ho, Wo], is computed from x.
enum class Prologue : int {
  // x itself.
  copy,
  // ReLU of the stencil of that kind with theta 1, stride 1 and dilation 1.
  vanilla,
  central,
  angular,
  radial,
  // ReLU of any other stencil.
  gather
};

// out[b, co, y, x] = sum_c hidden[b, c, y, x] point[co, c] (+ point_bias[co]) (+ residual). With a gate
// instead of the residual, out is 0 where gate <= 0. All tensors have the same dtype, and all images the same
// layout.
struct BlockProductArgs {
  DType dtype;
  bool channels_last;
  // Whether small images take the newer tiles, at_once and deep_medium; the results are the same.
  bool newer_tiles;
  Prologue prologue;
  // Of a gather.
  PdcKind kind;
  // theta == 1.
  bool pure;
  float theta;
  int64_t batch;
  int channels, height, width, out_channels, out_height, out_width;
  int stride_y, stride_x, dilation_y, dilation_x;
  const void* x;             // [B, C, H, W]
  const void* stencil;       // [C, 9]; not for a copy
  const void* stencil_bias;  // [C] or null
  const void* point;         // [Co, C]
  const void* point_bias;    // [Co] or null
  const void* residual;      // [B, Co, Ho, Wo] or null
  const void* gate;          // [B, Co, Ho, Wo] or null
  void* out;                 // [B, Co, Ho, Wo]
};

// Resources of the GPU. The choice of tiles depends on them, the results do not.
struct CudaLimits {
  int multiprocessors, shared_per_block, shared_per_multiprocessor;
};

// Tiles of the product and the kernels that compute them, see tiles.cuh.
enum class BlockTile : int { small, at_once, medium, deep_medium, large };

cudaError_t block_product_bf16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f32(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);

}  // namespace frd
