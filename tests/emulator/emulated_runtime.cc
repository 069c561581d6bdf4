// What the launchers ask of the CUDA runtime, answered as by an H100, or by an A100 where
// FRD_EMULATED_GPU=A100.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* gpu = std::getenv("FRD_EMULATED_GPU");
  const bool ampere = gpu != nullptr && std::strcmp(gpu, "A100") == 0;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = ampere ? 8 : 9;
      return cudaSuccess;
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
