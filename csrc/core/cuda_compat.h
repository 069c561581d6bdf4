// What differs between nvcc and the block emulator, with which the tests run kernels on the CPU.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
// Dynamic shared memory of a block, as an array `name` of `type`.
#define FRD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
// A kernel with template arguments goes in parentheses:
// FRD_LAUNCH((copy<float, 4>), grid, block, shared_bytes, stream, arguments...)
#define FRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// The same for a kernel whose blocks form thread block clusters along x (sm_90 and later).
#define FRD_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  ::frd::launch_cluster(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)
namespace frd {
template <class... P, class... A>
void launch_cluster(void (*kernel)(P...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, const A&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // The caller asks cudaGetLastError() for the result, as after <<<>>>.
  cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}
}  // namespace frd
#else
#include "block_emulator.h"
#endif
