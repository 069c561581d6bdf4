// All rounds of the clustering and the dispatch, one team of blocks for each item.
#pragma once
#include "cluster/cuda/to_be_deleted/icm_dispatch.cuh"

namespace frd {

template <class A>
FRD_DEVICE BlockArrays<A> block_arrays(const IcmArgs& a, A* shared) {
  const int64_t tile = int64_t{kTileRows} * tile_pitch(a.channels);
  A* workspace = static_cast<A*>(a.workspace) + static_cast<int64_t>(blockIdx.x) * a.workspace_stride;
  BlockArrays<A> own{};
  own.product = shared;
  own.scale = shared + kProductScratch;
  own.weight = own.scale + kTileRows;
  own.cosine = own.weight + kTileRows;
  own.label = reinterpret_cast<int32_t*>(own.cosine + kTileRows);
  shared += kBlockElements;
  own.values = a.plan.tiles_shared ? shared : workspace;
  own.keys = own.values + tile;
  if (a.plan.tiles_shared == a.plan.sums_shared)
    own.sums = own.keys + tile;
  else
    own.sums = a.plan.sums_shared ? shared : workspace;
  own.masses = own.sums + static_cast<int64_t>(a.plan.centres) * a.channels;
  own.tallies = own.masses + a.plan.centres;
  return own;
}

template <class T, int kBlocks>
FRD_DEVICE void run_item(const IcmArgs& a) {
  using A = compute_t<T>;
  using Blocks = Team<kBlocks>;
  FRD_DYNAMIC_SHARED(uint4, shared_groups);  // aligned for vectors
  const BlockArrays<A> own = block_arrays(a, reinterpret_cast<A*>(shared_groups));
#pragma unroll 1
  for (int t = 0; t < a.count; ++t) {
    TeamRound<T, kBlocks> round(a, own, t);
    round.pool();
    Blocks::sync();
    round.assign();
    Blocks::sync();
    round.finish();
    Blocks::sync();
  }
  if (!a.dispatch) return;
  const TeamDispatch<T, kBlocks> dispatch(a, own);
  if (a.dense)
    dispatch.dense();
  else
    dispatch.masked();
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kTeamThreads, 1) icm_kernel(const __grid_constant__ IcmArgs a) {
  if constexpr (is_launched<kBlocks>()) {
    run_item<T, kBlocks>(a);
  } else {
#if defined(__CUDACC__)
    __trap();
#endif
  }
}

}  // namespace frd
