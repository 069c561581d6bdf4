// The gradients of one item's tokens by a team, from those of the outputs, all rounds in one launch.
#pragma once
#include "cluster/cuda/to_be_deleted/grad_tokens.cuh"
#include "cluster/cuda/to_be_deleted/icm_dispatch_grad.cuh"

namespace frd {

// Everything of round t that follows from the gradients of its centres and cosines.
template <class T, int kBlocks>
FRD_DEVICE void round_grads(const GradItem<T, kBlocks>& g, int t) {
  mean_grads(g.renewed(), t);
  forget(t);
  if (!g.a.dense) {
    Team<kBlocks>::sync();
    token_pulls(g.renewed(), t);
    forget(t);
    Team<kBlocks>::sync();
    sum_pulls(g.renewed(), t);
    forget(t);
    Team<kBlocks>::sync();
  }
  if (g.a.round[t].key_weight != nullptr)
    projected_grads(g.renewed(), t);
  else
    centre_grads(g.renewed(), t);
  forget(t);
  Team<kBlocks>::sync();
  token_grads(g.renewed(), t);
}

// Block blockIdx.x % kBlocks of the team of item blockIdx.x / kBlocks.
template <class T, int kBlocks>
FRD_DEVICE void item_grads(const IcmGradArgs& a) {
  using A = compute_t<T>;
  FRD_DYNAMIC_SHARED(double2, shared);  // aligned for vectors
  const int64_t item = Team<kBlocks>::item();
  const int pitch = tile_pitch(a.channels);
  A* scratch = reinterpret_cast<A*>(shared) + kGradHeadBytes / sizeof(A);
  A* rows = a.block_memory != nullptr ? static_cast<A*>(a.block_memory) + int64_t{blockIdx.x} * a.block_rows
                                      : scratch + (a.projected ? kProductScratch : 0);
  const GradItem<T, kBlocks> g{a,
                               static_cast<int>(item),
                               a.channels,
                               static_cast<A*>(a.saved) + item * a.saved_stride,
                               static_cast<A*>(a.workspace) + item * a.workspace_stride,
                               a.labels + item * a.label_stride,
                               rows,
                               rows + int64_t{a.tile} * pitch,
                               scratch,
                               reinterpret_cast<double*>(shared),
                               pitch};
  if (a.dispatch) {
    if (a.dense)
      dense_dispatch_grad(g.renewed());
    else
      masked_dispatch_grad(g.renewed());
    Team<kBlocks>::sync();
  }
#pragma unroll 1
  for (int t = a.count - 1; t >= 0; --t) round_grads(g, t);
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kTeamThreads, 1) icm_grad_kernel(const __grid_constant__ IcmGradArgs a) {
  if constexpr (is_launched<kBlocks>()) {
    item_grads<T, kBlocks>(a);
  } else {
#if defined(__CUDACC__)
    __trap();
#endif
  }
}

}  // namespace frd
