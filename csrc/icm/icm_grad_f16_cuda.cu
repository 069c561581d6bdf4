#include "icm/icm_grad_launch.cuh"

namespace frd {

cudaError_t icm_grad_f16(const IcmGradArgs& a, cudaStream_t stream) { return launch_grads<f16>(a, stream); }

}  // namespace frd
