// Arguments of the CUDA kernels of `cluster_dispatch` and its backward. No torch here.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cluster/common.h"

namespace frd {

struct ClusterDispatchArgs {
  int64_t batch;
  int tokens, channels, count;  // N, C, O centres
  TokenView centres;            // [B, O, C]
  const int32_t* labels;        // [B, N]; -1: no centre
  const void* similarity;       // [B, N] in the dtype of the sums
  TokenView out;                // forward: [B, N, C]
  TokenView grad;               // backward: [B, N, C] of the output
  void* similarity_grad;        // [B, N] in the dtype of the sums
  TokenView centres_grad;       // [B, O, C]
  int chunks;                   // pieces of the sums over an item's tokens
  void* sums;                   // workspace [B, chunks, O, C] in the dtype of the sums
};

// Of N and O only; the partial centres are no more than the tokens.
inline int dispatch_chunks(int tokens, int centres) {
  return std::max(1, std::min({32, (tokens + 63) / 64, tokens / centres}));
}

cudaError_t cluster_dispatch(const ClusterDispatchArgs& args, cudaStream_t stream);
// shared_limit: bytes of shared memory that a block may have
cudaError_t cluster_dispatch_backward(const ClusterDispatchArgs& args, int shared_limit, cudaStream_t stream);

}  // namespace frd
