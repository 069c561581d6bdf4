// Arguments of the kernels of the clustering's gradients. No torch here.
#pragma once
#include "cluster/cuda/to_be_deleted/args.h"

namespace frd {

// Blocks of the largest team: so many parts the gates' gradients have for each item.
constexpr int kGradBlocks = 8;

// Where a round's parts begin in an item's workspace, in elements of the sums' type; what a round has no use
// for takes no room.
struct RoundWork {
  int64_t result_grad, mean_grad, pooled_grad;  // [O, C]
  int64_t mean_dot;                             // [O]
  int64_t sums, pulls;                          // [parts, O, C], [parts, O] of pull * token and of pull
  int64_t pull, similarity_grad;                // [N]
  int64_t flow, flow_grad;                      // [N] along the labels: see icm_dispatch_grad.cuh
  int64_t key_grad;    // [N + O, C] of the keys of the tokens and of the pooled tokens; projected
  int64_t token_grad;  // [N, C]; is result_grad of the round before; round 1: projected, key_grad times Wk
  int64_t product, product_grad;  // [N, J]; dense; the product lies in `saved` but for round 1
  int64_t query_grad;             // [J, C]; dense
  int parts;                      // pieces of a sum over the tokens of a label
};

struct RoundGradOut {
  void *key_weight, *key_bias, *value_weight, *value_bias;  // null for no projection
};

struct IcmGradArgs : IcmArgs {
  // icm: of the output [B, N, C]. cluster: of the centres [B, O, C] and of the similarities [B, N]
  TokenView grad;
  const void* similarity_grad;
  int64_t similarity_batch, similarity_token;

  TokenView keys_grad, values_grad;  // [B, N, C]; shared: all in keys_grad
  RoundWork work[kMaxRounds];
  RoundGradOut projection_grad[kMaxRounds];

  // of the dispatch, likewise
  int64_t last, coefficient;        // [N] last centre (int32) and weight along the labels
  int64_t gate, pull;               // [N, J]; dense
  int64_t last_sums;                // [dispatch_parts, J, C] gradient of the last centres
  int64_t query_sums, query_pulls;  // [dispatch_parts, J, C], [dispatch_parts, J]; dense
  int dispatch_parts;

  // Copies of the keys' tokens and of the gradient as rows [N, C] of the tokens' dtype, where that is not how
  // they lie in memory: sums over the tokens of a label gather rows.
  bool copies_keys, copies_grad;
  int64_t keys_copy, grad_copy;

  bool projected;      // any round
  int tile, row_step;  // rows of a tile; the rows of a block are a multiple of row_step
  // With too little shared memory for tiles of rows, they lie here: [B * team, block_rows]
  void* block_memory;
  int64_t block_rows;

  int team, gates;     // blocks of a team; elements of alpha
  double* gate_parts;  // [B, gates, kGradBlocks, 2] of alpha and of beta
  void *alpha_grad, *beta_grad;

  // Parts first_part[2 t] on are of the gradient of round t's Wk, first_part[2 t + 1] on of its Wv, each
  // [C + 1, C] with the bias's behind, of kPartRows rows of the batch.
  int first_part[2 * kMaxRounds + 1];
  void* weight_parts;
};

// A block's memory before the scratch of its products and its tiles of rows: sums in double of each warp.
constexpr int kGradHeadBytes = 128;

// Rows of the batch whose products one block adds.
constexpr int kPartRows = 512;

cudaError_t icm_grad_f32(const IcmGradArgs& a, cudaStream_t stream);
cudaError_t icm_grad_f64(const IcmGradArgs& a, cudaStream_t stream);
cudaError_t icm_grad_f16(const IcmGradArgs& a, cudaStream_t stream);
cudaError_t icm_grad_bf16(const IcmGradArgs& a, cudaStream_t stream);

}  // namespace frd
