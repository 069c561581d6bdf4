// The one line that differs between nvcc and the test-only block emulator, which runs kernel bodies on the
// CPU.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
// Dynamic shared memory of a block, as an array `name` of `type`.
#define FRD_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "block_emulator.h"
#endif
