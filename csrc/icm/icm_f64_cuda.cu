#include "icm/icm_launch.cuh"

namespace frd {

cudaError_t icm_f64(const IcmArgs& args, cudaStream_t stream) { return run_icm<double>(args, stream); }

}  // namespace frd
