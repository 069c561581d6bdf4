#include "pdc_block/point_grad_launch.cuh"

namespace frd {

cudaError_t point_grad_bf16(const PointGradArgs& a, cudaStream_t stream) {
  return point_grad<bf16>(a, stream);
}
cudaError_t point_grad_f16(const PointGradArgs& a, cudaStream_t stream) { return point_grad<f16>(a, stream); }
cudaError_t point_grad_f32(const PointGradArgs& a, cudaStream_t stream) {
  return point_grad<float>(a, stream);
}

}  // namespace frd
