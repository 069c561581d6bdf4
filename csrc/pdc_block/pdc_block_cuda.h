// Launchers of the fused block on CUDA, without torch.
#pragma once
#include <cuda_runtime_api.h>

#include "pdc/pdc_taps.h"

namespace frd {

// What makes a value of the product's left operand ("hidden", [B, C, Ho, Wo]) from x.
enum class Prologue : int {
  copy,  // x itself
  vanilla,
  central,
  angular,
  radial,  // ReLU of the stencil with theta 1, stride 1, dilation 1
  gather   // ReLU of any other stencil
};

// out [B, Co, Ho, Wo] = sum_c hidden[b, c, y, x] point[co, c] (+ point_bias[co]) (+ residual); where a gate
// is given, it is 0 where gate <= 0. All of the same dtype and, if an image, of the same layout.
struct BlockProductArgs {
  DType dtype;
  bool channels_last;
  Prologue prologue;
  PdcKind kind;  // of a gather
  bool pure;     // theta is 1
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

// What a card offers. The choice of tiles follows it; the results do not.
struct CudaLimits {
  int processors, shared_per_block, shared_per_processor;
};
cudaError_t cuda_limits(CudaLimits* limits);

// Sizes of a tile of the product, as the launcher names them.
enum class BlockTile : int { small, medium, large };

cudaError_t block_product_bf16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f32(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);

}  // namespace frd
