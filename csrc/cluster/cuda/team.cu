#include "cluster/cuda/team.h"

#include "core/cuda_compat.h"

namespace frd {
namespace {

__global__ void compiled_like_the_others() {}

}  // namespace

cudaError_t team_blocks(int* blocks) {
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(compiled_like_the_others));
  *blocks = attributes.ptxVersion >= 90 ? 8 : 1;
  return error;
}

}  // namespace frd
