#include "pdc_block/block_launch.cuh"

namespace frd {

cudaError_t block_product_f16(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream) {
  return block_product<f16>(a, limits, stream);
}

}  // namespace frd
