// What differs between nvcc and the test-only block emulator, which runs kernel bodies on the CPU.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
// Dynamic shared memory of a block, as an array `name` of `type`.
#define FRD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
// kernel in parentheses: FRD_LAUNCH((copy<float, 4>), grid, block, shared_bytes, stream, arguments...)
#define FRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#else
#include "block_emulator.h"
#endif
