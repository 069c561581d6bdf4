#pragma once
#include <cuda_runtime_api.h>

#include "pdc/pdc_weight_kernel.h"

namespace frd {
// Both on args.in / args.out in device memory; pairs = O * I.
cudaError_t pdc_weight_forward_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);
cudaError_t pdc_weight_transposed_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream);
}  // namespace frd
