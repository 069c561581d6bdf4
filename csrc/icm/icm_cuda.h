// Arguments of the clustering's CUDA kernels. No torch here.
#pragma once
#include <cuda_runtime_api.h>

#include "icm/round.h"
#include "icm/saved.h"

namespace frd {

constexpr int kMaxRounds = 8;

struct RoundArgs {
  int height, width, rows, columns;  // of the tokens' image; of the grid of centres
  int64_t labels;                    // where its labels begin in an item's
  SavedRound saved;
  // Wk [C, C], bk [C], Wv [C, C], bv [C], contiguous, in the dtype of the tokens; all null for no projection
  const void *key_weight, *key_bias, *value_weight, *value_bias;

  FRD_HD int tokens() const { return height * width; }
  FRD_HD int centres() const { return rows * columns; }
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
};

}  // namespace frd
