#include "icm/icm_grad_launch.cuh"

namespace frd {

cudaError_t icm_grad_bf16(const IcmGradArgs& a, cudaStream_t stream) { return launch_grads<bf16>(a, stream); }

}  // namespace frd
