#include "pdc_block/block_launch.cuh"

namespace frd {

cudaError_t block_product_bf16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream) {
  return block_product<bf16>(a, limits, stream);
}

}  // namespace frd
