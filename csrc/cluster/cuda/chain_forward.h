// The launches of the forward of `cluster` and `icm`, in this order, and their arguments. No torch here.
#pragma once
#include "cluster/cuda/chain.h"
#include "cluster/cuda/chain_product.h"

namespace frd {
namespace chain {

struct Forward {
  DType dtype;
  int64_t batch;
  int channels, count;  // C; T rounds
  Round round[kMaxRounds];
  TokenView keys, values;  // [B, N, C] of round 1; icm: both x
  const bool* mask;        // [B, N] with these strides, or null; cluster alone
  int64_t mask_batch, mask_token;

  bool weighted;              // tokens weigh sigmoid(beta + alpha * cosine) instead of 1
  bool ordered;               // the arg-max is over the cosines times the sign of alpha
  bool dense;                 // icm: the dispatch of the variant paper (Eq. 4), else along the labels
  const float *alpha, *beta;  // [T] where weighted, else [1]

  int32_t* labels;  // [B, label_stride]
  int64_t label_stride;
  float* saved;  // [B, at.size]
  Saved at;

  // Workspace, float. Without a projection the keys' bin means are the pooled keys, at.round[0].pooled.
  float* pooled_values;   // [B, O_1, C] bin means of the values
  float* pooled_squares;  // [B, square_tiles, O_1] of the pooled keys, from their product
  int square_tiles;       // 0 without a projection
  float* token_keys;  // [B, N, C] keys of round 1 from a product; null: `keys` has them, or see fuses_keys()
  // icm with T > 1, what the dispatch takes of the rounds from 2 on for each centre of round 1. [B,
  // link_stride]: dense: the products of the cosines' matrices of rounds t .. T, [O_(t-1), J] for t = 2, 3 ..
  // T, a part of `saved` (Saved::links); else the product of the similarities along its chain of centres,
  // [O_1], and the last of them, int32 [O_1].
  float* links;
  int64_t link_stride;

  TokenView out;  // icm: [B, N, C]
  // cluster
  TokenView centres;  // [B, O, C]
  float* similarity;  // [B, N]
  int32_t* counts;    // [B, O]

  bool icm() const { return out.data != nullptr; }
  bool projected() const { return round[0].key_weight != nullptr; }
};

// The keys of round 1 are made within run_assign, and so not in memory.
inline bool fuses_keys(const Forward& a) {
  return a.dtype == DType::bf16 && a.projected() && a.channels % 64 == 0 && a.channels <= 256;
}

// 1: bin means of the values; without a projection those of the keys as well, to `pooled` of round 1. On the
// blocks that are left: products of what is older than this launch.
cudaError_t run_pool(const Forward& args, const Products& beside, cudaStream_t stream);
// 2 (with a projection): the product to `pooled` of round 1 with its row_squares, run_products.
// 3: inv_norm, cosine, pooled_inv_norm and matrix of round 1, its labels; cluster: similarity.
cudaError_t run_assign(const Forward& args, cudaStream_t stream);
// 4: mean and scale of round 1; cluster: centres and counts.
cudaError_t run_aggregate(const Forward& args, cudaStream_t stream);
// 5: the product to `rows` of round 1, run_products.
// 6 (T > 1): rounds 2 to T of `saved`, their labels, `links`.
cudaError_t run_late(const Forward& args, cudaStream_t stream);
// 7: `out`.
cudaError_t run_dispatch(const Forward& args, cudaStream_t stream);

}  // namespace chain
}  // namespace frd
