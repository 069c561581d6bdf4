#include "icm/icm_launch.cuh"

namespace frd {

cudaError_t icm_f16(const IcmArgs& args, cudaStream_t stream) { return run_icm<f16>(args, stream); }

}  // namespace frd
