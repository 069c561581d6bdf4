// Arguments of the clustering's CUDA kernels. No torch here.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cluster/common.h"
#include "cluster/cuda/block.h"
#include "cluster/saved.h"

namespace frd {

constexpr int kMaxRounds = 8;

constexpr int kTeamThreads = kBlockThreads, kTeamWarps = kBlockWarps;

// Elements of the compute type that a product (product.cuh) needs in shared memory, for a tile of the
// matrix and one of the rows.
constexpr int kProductColumns = 128, kProductDepth = 32;
constexpr int kProductPitch = kProductColumns + 4, kProductRowPitch = kProductDepth + 4;
constexpr int kProductScratch = kProductDepth * kProductPitch + kTileRows * kProductRowPitch;

struct RoundArgs {
  int height, width, rows, columns;  // of the tokens' image; of the grid of centres
  int64_t labels;                    // where its labels begin in an item's
  SavedRound saved;
  // Wk [C, C], bk [C], Wv [C, C], bv [C], contiguous, in the dtype of the tokens; all null for no projection
  const void *key_weight, *key_bias, *value_weight, *value_bias;

  FRD_HD int tokens() const { return height * width; }
  FRD_HD int centres() const { return rows * columns; }
};

// Where a block of the forward kernel has its arrays; what does not fit the shared memory lies in the
// workspace.
struct IcmPlan {
  int team;                        // blocks: 8 or 1
  int centres;                     // the most of a round
  bool tiles_shared, sums_shared;  // the tiles of tokens and of keys; the block's sums over clusters
  int shared_bytes;
  int64_t workspace;  // elements of a block
};

// `cluster` is one round without projections or dispatch; `icm` has keys == values == x.
struct IcmArgs {
  DType dtype;
  int64_t batch;
  int channels, count;  // C; T rounds
  RoundArgs round[kMaxRounds];
  TokenView keys, values;  // [B, N, C] of round 1; later rounds take the result of the one before, in `saved`
  bool shared;             // keys and values are the same tokens
  const bool* mask;        // [B, N] with these strides, or null; cluster only
  int64_t mask_batch, mask_token;

  bool weighted;             // tokens weigh sigmoid(beta + alpha * cosine) instead of 1
  bool ordered;              // the arg-max is over the cosines times the sign of alpha
  const void *alpha, *beta;  // in the dtype of the sums: [T] where weighted, else [1]

  int32_t* labels;  // [B, label_stride]
  int64_t label_stride;
  void* saved;  // [B, saved_stride] in the dtype of the sums
  int64_t saved_stride;
  void* workspace;  // [B * blocks of a team, workspace_stride], likewise
  int64_t workspace_stride;

  // icm: the dispatch to out [B, N, C]; dense (paper, Eq. 4) with J = columns, else along the labels.
  bool dispatch, dense;
  int columns;
  TokenView out;

  // cluster: similarity [B, N] (sums' dtype), counts [B, O], centres [B, O, C] (tokens' dtype); each may be
  // null
  void* similarity;
  int32_t* counts;
  TokenView centres;

  IcmPlan plan;
};

// Elements of a block's arrays: always in shared memory; the two tiles; the sums.
constexpr int kBlockElements = kProductScratch + 4 * kTileRows;
FRD_HD static inline int64_t tile_elements(int channels) {
  return int64_t{2} * kTileRows * tile_pitch(channels);
}
FRD_HD static inline int64_t sums_elements(int centres, int channels) {
  return (static_cast<int64_t>(centres) * (channels + 2) + 3) / 4 * 4;
}
// For teams of so many blocks with so many bytes of shared memory each.
inline IcmPlan plan_icm(const IcmArgs& a, int team, int shared_limit) {
  const int64_t size = a.dtype == DType::f64 ? 8 : 4, room = shared_limit / size - kBlockElements;
  IcmPlan plan{};
  for (int t = 0; t < a.count; ++t) plan.centres = std::max(plan.centres, a.round[t].centres());
  const int64_t tiles = tile_elements(a.channels), sums = sums_elements(plan.centres, a.channels);
  plan.team = team;
  plan.tiles_shared = tiles <= room;
  plan.sums_shared = sums <= (plan.tiles_shared ? room - tiles : room);
  const int64_t shared = (plan.tiles_shared ? tiles : 0) + (plan.sums_shared ? sums : 0);
  plan.shared_bytes = static_cast<int>((kBlockElements + shared) * size);
  plan.workspace = tiles + sums - shared;
  return plan;
}

cudaError_t icm_f32(const IcmArgs& args, cudaStream_t stream);
cudaError_t icm_f64(const IcmArgs& args, cudaStream_t stream);
cudaError_t icm_f16(const IcmArgs& args, cudaStream_t stream);
cudaError_t icm_bf16(const IcmArgs& args, cudaStream_t stream);

}  // namespace frd
