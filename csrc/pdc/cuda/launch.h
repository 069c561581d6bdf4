// Launches of the depthwise difference convolution. No torch header, so that a plain main() can drive them.
#pragma once
#include <cuda_runtime_api.h>

#include "pdc/weight.h"

namespace frd {

struct PdcProblem {
  PdcAxis y, x;  // of the forward
  int64_t batch, channels;
  PdcKind kind;
  double theta;
  DType dtype;
  bool pixels;         // channels_last
  const void* source;  // x: [B, C, H, W] or [B, H, W, C]
  const void* weight;  // [C, 9]
  const void* bias;    // forward: [C] or null
  const void* grad;    // backward: of y
  void* out;           // forward: y; backward: dx or null
  void *dw, *db;       // backward: [C, 9] and [C], or null both
  void* sums;          // backward with dw: compute type, [parts, 10, C]
};

cudaError_t pdc_forward_cuda(const PdcProblem& problem, cudaStream_t stream);

// Parts of dw and db that the backward leaves in `sums`: they depend on the shapes and the alignment only.
int pdc_parts_cuda(const PdcProblem& problem);
cudaError_t pdc_backward_cuda(const PdcProblem& problem, cudaStream_t stream);

// The three families of kernels. The first two take what fits them.
bool pdc_pixels_fit(const PdcProblem& problem);
int pdc_pixels_parts(const PdcProblem& problem);
cudaError_t pdc_pixels_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);
bool pdc_planes_fit(const PdcProblem& problem);
int pdc_planes_parts(const PdcProblem& problem);
cudaError_t pdc_planes_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);
int pdc_gather_parts(const PdcProblem& problem);
cudaError_t pdc_gather_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);

// The weight transform and its transpose, on args.in and args.out in device memory; pairs = O * I.
cudaError_t pdc_weight_forward_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);
cudaError_t pdc_weight_transposed_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);

}  // namespace frd
