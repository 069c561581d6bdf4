// The clustering's forward, compiled once for each FRD_DTYPE.
#include "cluster/cuda/to_be_deleted/icm_launch.cuh"
#include "core/instantiate.h"

namespace frd {

cudaError_t FRD_OF_DTYPE(icm)(const IcmArgs& args, cudaStream_t stream) {
  return run_icm<FRD_DTYPE>(args, stream);
}

}  // namespace frd
