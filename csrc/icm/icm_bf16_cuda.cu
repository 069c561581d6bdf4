#include "icm/icm_launch.cuh"

namespace frd {

cudaError_t icm_bf16(const IcmArgs& args, cudaStream_t stream) { return run_icm<bf16>(args, stream); }

}  // namespace frd
