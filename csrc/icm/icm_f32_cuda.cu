#include "icm/icm_launch.cuh"

namespace frd {

cudaError_t icm_f32(const IcmArgs& args, cudaStream_t stream) { return run_icm<float>(args, stream); }

}  // namespace frd
