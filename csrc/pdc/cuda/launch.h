// Launchers of the depthwise pixel difference convolution and of its weight transform, without torch.
#pragma once
#include <cuda_runtime_api.h>

#include "pdc/weight.h"

namespace frd {

// A call of the forward or the backward; images are [B, C, H, W] or, in channels_last, [B, H, W, C].
struct PdcProblem {
  // Of the forward.
  PdcAxis y, x;
  int64_t batch, channels;
  PdcKind kind;
  double theta;
  DType dtype;
  bool channels_last;
  const void* source;  // x
  const void* weight;  // [C, 9]
  const void* bias;    // forward: [C] or null
  void* gated;         // forward: dL/d relu(y), or null; see pdc_forward_cuda
  const void* grad;    // backward: dy
  void* out;           // forward: y; backward: dx or null
  void* dw;            // backward: [C, 9] or null
  void* db;            // backward: [C]; null exactly if dw is
  void* sums;          // backward with dw: compute type, [parts, 10, C]
};

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]). With `gated` instead relu(y), while `gated`, the
// gradient of relu(y), becomes that of y in its place.
cudaError_t pdc_forward_cuda(const PdcProblem& problem, cudaStream_t stream);

// Number of partial sums of dw and db in `sums`. It depends on the shapes and the alignment only.
int pdc_parts_cuda(const PdcProblem& problem);
// dx, and dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy
cudaError_t pdc_backward_cuda(const PdcProblem& problem, cudaStream_t stream);

// The three families of kernels: tiled for channels_last, tiled for NCHW, and the general one (gather) for
// whatever does not fit those.
bool pdc_channels_last_fit(const PdcProblem& problem);
int pdc_channels_last_parts(const PdcProblem& problem);
cudaError_t pdc_channels_last_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);
bool pdc_nchw_fit(const PdcProblem& problem);
int pdc_nchw_parts(const PdcProblem& problem);
cudaError_t pdc_nchw_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);
int pdc_gather_parts(const PdcProblem& problem);
cudaError_t pdc_gather_launch(const PdcProblem& problem, bool backward, cudaStream_t stream);

// The weight transform and its transpose, from args.in to args.out in device memory; pairs = O * I.
cudaError_t pdc_weight_forward_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);
cudaError_t pdc_weight_transposed_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);

}  // namespace frd
