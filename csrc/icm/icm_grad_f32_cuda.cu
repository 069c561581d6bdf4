#include "icm/icm_grad_launch.cuh"

namespace frd {

cudaError_t icm_grad_f32(const IcmGradArgs& a, cudaStream_t stream) { return launch_grads<float>(a, stream); }

}  // namespace frd
