// Programmatic dependent launch (sm_90 and later): a kernel may start while the one before it in the stream
// still runs, and prefetch what is older than that. Every kernel of such a chain calls wait_for_previous()
// once, and let_next_start() only after it: then what was launched two before has ended as well.
#pragma once
#include "core/cuda_compat.h"
#include "core/cuda_device.h"
#include "core/mma.h"

namespace frd {

// The previous kernel has ended and its writes are visible. Before it, the first launch of an operator reads
// nothing, as any kernel may have written its inputs just before; a later one reads only the operator's
// inputs and what was written two launches before or earlier.
FRD_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FRD_DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches kernel(args...), dependent where the device can, with `bytes` of dynamic shared memory. A macro,
// as the emulator launches by name: FRD_LAUNCH_DEPENDENT(kernel, grid, block, bytes, stream, args...)
#if defined(__CUDACC__)
#define FRD_LAUNCH_DEPENDENT(kernel, grid, block, bytes, stream, ...) \
  ::frd::launch_dependent(kernel, grid, block, bytes, stream, __VA_ARGS__)
template <class... P, class... A>
cudaError_t launch_dependent(void (*kernel)(P...), dim3 grid, dim3 block, int bytes, cudaStream_t stream,
                             const A&... args) {
  if (const cudaError_t error = allow_shared_memory(kernel, bytes)) return error;
  // Code for older GPUs, which a newer one may run, does not wait.
  int architecture = 0;
  if (const cudaError_t error = compiled_for(kernel, &architecture)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = architecture >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}
#else
#define FRD_LAUNCH_DEPENDENT(kernel, grid, block, bytes, stream, ...) \
  (FRD_LAUNCH(kernel, grid, block, bytes, stream, __VA_ARGS__), cudaGetLastError())
#endif

}  // namespace frd
