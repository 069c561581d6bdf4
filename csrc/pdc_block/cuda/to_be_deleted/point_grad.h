// Launcher of the gradient of the 1x1 weight, without torch.
#pragma once
#include <cuda_runtime_api.h>

#include "core/dtypes.h"

namespace frd {

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

cudaError_t point_grad_bf16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f16(const PointGradArgs& a, cudaStream_t stream);
cudaError_t point_grad_f32(const PointGradArgs& a, cudaStream_t stream);

}  // namespace frd
