// What the launchers ask of the CUDA runtime, answered as by an H100, or by the GPU that FRD_EMULATED_GPU
// names.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace {

struct Gpu {
  const char* name;
  int ptx_version, multiprocessors, shared_per_block, shared_per_multiprocessor;
};
// The L4 stands for the GPUs with the least shared memory, sm_86, 89 and 120.
constexpr Gpu kGpus[] = {
    {"H100", 90, 132, 227 * 1024, 228 * 1024},
    {"A100", 80, 108, 163 * 1024, 164 * 1024},
    {"L4", 80, 58, 99 * 1024, 100 * 1024},
};

// Of kGpus. Each is a device of its own: what is known of one does not hold for the others.
int current() {
  const char* name = std::getenv("FRD_EMULATED_GPU");
  for (int i = 0; name && i < 3; ++i)
    if (std::strcmp(kGpus[i].name, name) == 0) return i;
  return 0;
}

}  // namespace

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = kGpus[current()].ptx_version;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = current();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kGpus[device].multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kGpus[device].shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kGpus[device].shared_per_multiprocessor;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}
}
