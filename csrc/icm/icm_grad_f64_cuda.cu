#include "icm/icm_grad_launch.cuh"

namespace frd {

cudaError_t icm_grad_f64(const IcmGradArgs& a, cudaStream_t stream) {
  return launch_grads<double>(a, stream);
}

}  // namespace frd
