#include "cluster/cuda/to_be_deleted/team.h"

#include "core/cuda_compat.h"
#include "core/cuda_device.h"

namespace frd {
namespace {

__global__ void compiled_like_the_others() {}

}  // namespace

cudaError_t team_blocks(int* blocks) {
  static DeviceTable<int> table;
  return table.visit(0, [&](int, int& known) {
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaSuccess;
    if (known == 0) {
      error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(compiled_like_the_others));
      if (error == cudaSuccess) known = attributes.ptxVersion >= 90 ? 8 : 1;
    }
    *blocks = known;
    return error;
  });
}

}  // namespace frd
