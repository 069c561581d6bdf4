// Launch of the clustering's kernel, for the source that is compiled per dtype.
#pragma once
#include "cluster/cuda/to_be_deleted/icm.cuh"
#include "core/cuda_device.h"

namespace frd {

template <class T, int kBlocks>
cudaError_t launch_icm(const IcmArgs& a, cudaStream_t stream) {
  const auto kernel = icm_kernel<T, kBlocks>;
  if (const cudaError_t error = allow_shared_memory(kernel, a.plan.shared_bytes)) return error;
  const dim3 grid(static_cast<unsigned>(a.batch * kBlocks)), block(kTeamThreads);
  if constexpr (kBlocks == 1)
    FRD_LAUNCH(kernel, grid, block, a.plan.shared_bytes, stream, a);
  else
    FRD_LAUNCH_CLUSTER(kernel, kBlocks, grid, block, a.plan.shared_bytes, stream, a);
  return cudaGetLastError();
}

template <class T>
cudaError_t run_icm(const IcmArgs& a, cudaStream_t stream) {
  return a.plan.team == 8 ? launch_icm<T, 8>(a, stream) : launch_icm<T, 1>(a, stream);
}

}  // namespace frd
