// Device guard, current stream and registration of the operators in cuda/*.cpp.
#pragma once
#include <cuda_runtime_api.h>

#include "core/stable.h"

#if defined(FRD_EMULATED)
#include "emulated_launch.h"  // the tests build the same launchers for CPU tensors, over the block emulator
#else

#define FRD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(frd, CUDA, m)
#define FRD_OP(name) "frd::" name  // for a call through the dispatcher

namespace frd {

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
