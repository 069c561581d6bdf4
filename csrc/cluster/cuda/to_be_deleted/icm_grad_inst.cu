// The clustering's backward, compiled once for each FRD_DTYPE.
#include "cluster/cuda/to_be_deleted/icm_grad_launch.cuh"
#include "core/instantiate.h"

namespace frd {

cudaError_t FRD_OF_DTYPE(icm_grad)(const IcmGradArgs& args, cudaStream_t stream) {
  return launch_grads<FRD_DTYPE>(args, stream);
}

}  // namespace frd
