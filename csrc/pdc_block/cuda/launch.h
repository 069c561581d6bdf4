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

// Sizes of a tile of the product.
enum class BlockTile : int { small, medium, large };

// d_point[co, c] = sum over images and pixels of grad[co] relu(hidden[c]), d_bias[co] = sum of grad[co].
struct PointGradArgs {
  DType dtype;
  bool channels_last;
  int64_t batch;
  // Of an image.
  int64_t pixels;
  int channels, out_channels;
  int parts;           // from point_grad_parts()
  const void* grad;    // [B, Co, Ho, Wo]
  const void* hidden;  // [B, C, Ho, Wo]
  float* partial;      // workspace [parts, Co * C + Co]
  void* d_point;       // [Co, C]
  void* d_bias;        // [Co]
};

// Parts of the sum over all pixels: enough to fill a GPU, but much smaller in total than the images. They
// depend on the shapes alone, and so does the order of the sum.
inline int point_grad_parts(int64_t batch, int64_t pixels) {
  constexpr int64_t kPixelsPerPart = 256;
  constexpr int64_t kMinParts = 16;
  constexpr int64_t kMaxParts = 64;
  const int64_t runs = (batch * pixels + kPixelsPerPart / 4 - 1) / (kPixelsPerPart / 4);
  if (runs <= kMinParts) return static_cast<int>(runs);
  const int64_t parts = runs / 4 < kMinParts ? kMinParts : runs / 4;
  return static_cast<int>(parts < kMaxParts ? parts : kMaxParts);
}

cudaError_t block_product_bf16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t block_product_f32(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream);
cudaError_t point_grad_bf16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f32(const PointGradArgs& a, cudaStream_t stream);

}  // namespace frd
