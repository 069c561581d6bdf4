// The block's product, compiled once for each FRD_DTYPE: f32, f16, bf16. In float64 Python composes the block
// of its parts.
#include "core/instantiate.h"
#include "pdc_block/cuda/tiles.cuh"

namespace frd {

cudaError_t FRD_OF_DTYPE(block_product)(const BlockProductArgs& a, const CudaLimits& limits,
                                        cudaStream_t stream) {
  return block_product<FRD_DTYPE>(a, limits, stream);
}

}  // namespace frd
