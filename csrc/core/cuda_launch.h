// Device guard, current stream and registration for the CUDA operators.
#pragma once
#include <cuda_runtime_api.h>

#include "core/stable.h"

#if defined(FRD_EMULATED)
// The tests build the same operators for CPU tensors, on the block emulator.
#include "emulated_launch.h"
#else

#define FRD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(frd, CUDA, m)
#define FRD_CHAIN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(frd_chain, CUDA, m)
// Name of an operator for a call through the dispatcher.
#define FRD_OP(name) "frd::" name

namespace frd {

// Makes the device of a tensor current for its lifetime, and gives the device's current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace frd
#endif
