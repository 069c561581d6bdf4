// Which teams the clustering's kernels were compiled for. No torch here.
#pragma once
#include <cuda_runtime_api.h>

namespace frd {

// Blocks of a team: 8 in code for sm_90 and later, 1 in code for what was before, also where a later GPU runs
// it from PTX.
cudaError_t team_blocks(int* blocks);

}  // namespace frd
