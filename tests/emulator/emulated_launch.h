// The launchers of the CUDA kernels as operators on CPU tensors, in a namespace of their own: the whole op,
// checks and launch configuration included, goes through the same Python suite as every other backend.
#pragma once
#include "block_emulator.h"

#define FRD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(frd_emulated, CPU, m)
#define FRD_CHAIN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(frd_emulated_chain, CPU, m)
#define FRD_OP(name) "frd_emulated::" name
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, "emulated: " #call)

namespace frd {

class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace frd
