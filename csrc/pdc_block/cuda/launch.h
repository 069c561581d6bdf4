// Launchers of the fused block on CUDA, without torch.
#pragma once
#include <cuda_runtime_api.h>

#include "pdc/taps.h"

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

// out [B, Co, Ho, Wo] = sum_c hidden[b, c, y, x] point[co, c] (+ point_bias[co]) (+ residual); or, with a
// gate in place of the residual, 0 where gate <= 0. All of the same dtype and, if an image, of the same
// layout.
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

// Sizes of a tile of the product, as the launcher names them.
enum class BlockTile : int { small, medium, large };

// d_point [Co, C] = sum over images and pixels of grad[co] relu(hidden[c]), d_bias [Co] = sum of grad[co].
struct PointGradArgs {
  DType dtype;
  bool channels_last;
  int64_t batch, pixels;  // of an image
  int channels, out_channels;
  int parts;           // from point_grad_parts()
  const void* grad;    // [B, Co, Ho, Wo]
  const void* hidden;  // [B, C, Ho, Wo]
  float* partial;      // [parts, Co * C + Co], to write in
  void *d_point, *d_bias;
};

// Parts of the sum over all pixels: enough to fill a card, few enough that they stay far below the images in
// size. They follow the shapes alone, so that the result does.
inline int point_grad_parts(int64_t batch, int64_t pixels) {
  constexpr int64_t kPixelsOfPart = 256;
  constexpr int64_t kFew = 16;
  constexpr int64_t kMost = 64;
  const int64_t runs = (batch * pixels + kPixelsOfPart / 4 - 1) / (kPixelsOfPart / 4);
  if (runs <= kFew) return static_cast<int>(runs);
  const int64_t parts = runs / 4 < kFew ? kFew : runs / 4;
  return static_cast<int>(parts < kMost ? parts : kMost);
}

cudaError_t block_product_bf16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f32(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t point_grad_bf16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f32(const PointGradArgs& a, cudaStream_t stream);

}  // namespace frd
