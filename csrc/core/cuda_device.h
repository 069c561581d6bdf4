// What the CUDA runtime is told or asked once per device: each time would take up to a microsecond of a call.
#pragma once
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

namespace frd {

// One int per device and key, behind a lock.
template <class Key>
class DeviceTable {
 public:
  // Calls update(device, value), where value is the entry for the current device, initially 0.
  template <class Update>
  cudaError_t visit(Key key, const Update& update) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    return update(device, entries_[{device, key}]);
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, Key>, int> entries_;
};

// An attribute of the current device; those that are asked for are never 0.
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  static DeviceTable<cudaDeviceAttr> table;
  return table.visit(attribute, [&](int device, int& known) {
    const cudaError_t error = known ? cudaSuccess : cudaDeviceGetAttribute(&known, attribute, device);
    *value = known;
    return error;
  });
}

// The virtual architecture that the loaded code of a kernel was compiled for, such as 90.
template <class... P>
cudaError_t compiled_for(void (*kernel)(P...), int* architecture) {
  static DeviceTable<const void*> table;
  const void* const address = reinterpret_cast<const void*>(kernel);
  return table.visit(address, [&](int, int& known) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = known ? cudaSuccess : cudaFuncGetAttributes(&attributes, address);
    if (known == 0 && error == cudaSuccess) known = attributes.ptxVersion;
    *architecture = known;
    return error;
  });
}

// Lets launches of a kernel on the current device have up to `bytes` of dynamic shared memory.
template <class... P>
cudaError_t allow_shared_memory(void (*kernel)(P...), int bytes) {
  static DeviceTable<const void*> table;
  const void* const address = reinterpret_cast<const void*>(kernel);
  return table.visit(address, [&](int, int& allowed) {
    if (bytes <= allowed) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) allowed = bytes;
    return error;
  });
}

}  // namespace frd
