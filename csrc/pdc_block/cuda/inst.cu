// The block's product and the gradient of its 1x1 weight, compiled once for each FRD_DTYPE: f32, f16, bf16.
// In float64 Python composes the block of its parts.
#include "core/instantiate.h"
#include "pdc_block/cuda/block.cuh"
#include "pdc_block/cuda/point_grad.cuh"

namespace frd {

cudaError_t FRD_OF_DTYPE(block_product)(const BlockProductArgs& a, const CudaLimits& limits,
                                        cudaStream_t stream) {
  return block_product<FRD_DTYPE>(a, limits, stream);
}

cudaError_t FRD_OF_DTYPE(point_grad)(const PointGradArgs& a, cudaStream_t stream) {
  return point_grad<FRD_DTYPE>(a, stream);
}

}  // namespace frd
