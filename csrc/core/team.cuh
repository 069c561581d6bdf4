// A team: the thread blocks that work on one sample of the batch together, which are a thread block cluster
// (sm_90 and later) or a single block.
#pragma once
#include "core/cuda_compat.h"
#include "core/dtypes.h"

namespace frd {

// Launched with FRD_LAUNCH_CLUSTER(kernel, kBlocks, ...) or, kBlocks == 1, with FRD_LAUNCH.
template <int kBlocks>
struct Team {
  static constexpr int blocks = kBlocks;

  static __device__ int rank() { return static_cast<int>(blockIdx.x % kBlocks); }
  // The sample of the batch.
  static __device__ int64_t item() { return blockIdx.x / kBlocks; }

  // Barrier of all threads of the team; makes their writes to shared and global memory visible to the others.
  // A block must not access the shared memory of another before the first sync, nor exit while others may
  // still access its own.
  static __device__ void sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "barrier.cluster.arrive.release.aligned;\n"
          "barrier.cluster.wait.acquire.aligned;" ::
              : "memory");
#else
      __trap();
#endif
#else
      emu::wait(emu::State::at_cluster_barrier);
#endif
    }
  }

  // Address in the block of that rank of the shared memory that is at `own` in this block.
  template <class T>
  static __device__ T* peer(T* own, int rank) {
    if constexpr (kBlocks == 1) return own;
#if defined(__CUDACC__)
    T* there = own;
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
#endif
    return there;
#else
    return emu::map_shared(own, rank);
#endif
  }
};

}  // namespace frd
