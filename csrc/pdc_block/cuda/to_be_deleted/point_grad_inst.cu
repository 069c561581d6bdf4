// The gradient of the block's 1x1 weight, compiled once for each FRD_DTYPE: f32, f16, bf16.
#include "core/instantiate.h"
#include "pdc_block/cuda/to_be_deleted/point_grad.cuh"

namespace frd {

cudaError_t FRD_OF_DTYPE(point_grad)(const PointGradArgs& a, cudaStream_t stream) {
  return point_grad<FRD_DTYPE>(a, stream);
}

}  // namespace frd
