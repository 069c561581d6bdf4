// What the launchers ask of the CUDA runtime, answered as by an H100, or by an A100 where
// FRD_EMULATED_GPU=A100.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace {

bool is_ampere() {
  const char* gpu = std::getenv("FRD_EMULATED_GPU");
  return gpu != nullptr && std::strcmp(gpu, "A100") == 0;
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = is_ampere() ? 80 : 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  // Not the same device: what is known of one does not hold for the other.
  *device = is_ampere() ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool ampere = is_ampere();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = ampere ? 108 : 132;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (ampere ? 163 : 227) * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (ampere ? 164 : 228) * 1024;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}
}
