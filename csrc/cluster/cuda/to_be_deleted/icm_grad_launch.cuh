// Launches of the clustering's gradients, for the source that is compiled per dtype.
#pragma once
#include "cluster/cuda/to_be_deleted/icm_grad.cuh"
#include "cluster/cuda/to_be_deleted/weight_grad.cuh"
#include "core/cuda_device.h"

namespace frd {

template <class T, int kBlocks>
cudaError_t launch_item_grads(const IcmGradArgs& a, cudaStream_t stream) {
  using A = compute_t<T>;
  const int64_t rows = a.block_memory != nullptr ? 0 : int64_t{2} * a.tile * tile_pitch(a.channels);
  const int shared =
      kGradHeadBytes + static_cast<int>(((a.projected ? kProductScratch : 0) + rows) * sizeof(A));
  const auto kernel = icm_grad_kernel<T, kBlocks>;
  if (const cudaError_t error = allow_shared_memory(kernel, shared)) return error;
  const dim3 grid(static_cast<unsigned>(a.batch * kBlocks)), block(kTeamThreads);
  if constexpr (kBlocks == 1)
    FRD_LAUNCH(kernel, grid, block, shared, stream, a);
  else
    FRD_LAUNCH_CLUSTER(kernel, kBlocks, grid, block, shared, stream, a);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_grads(const IcmGradArgs& a, cudaStream_t stream) {
  if (a.batch > 0) {
    const auto launch = a.team == 1 ? launch_item_grads<T, 1> : launch_item_grads<T, kGradBlocks>;
    if (const cudaError_t error = launch(a, stream)) return error;
  }
  const unsigned tiles = (a.channels + kGradTile - 1) / kGradTile;
  if (const int parts = a.first_part[2 * a.count]; parts > 0) {
    FRD_LAUNCH((weight_grad_kernel<T>), dim3(parts, tiles, tiles), dim3(kTeamThreads),
               WeightSums<T>::kSharedBytes, stream, a);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  const int64_t size = a.projected ? int64_t{a.channels + 1} * a.channels : 1;
  FRD_LAUNCH((grad_reduce_kernel<T>),
             dim3(static_cast<unsigned>((size + kTeamThreads - 1) / kTeamThreads), 2 * a.count + 1),
             dim3(kTeamThreads), kTeamWarps * sizeof(double), stream, a);
  return cudaGetLastError();
}

}  // namespace frd
