// Backward of the chain: what its launches hand to each other. No torch here.
//
// Notation of the comments, with T rounds and J = O_T: u and c are the unit keys of tokens and of pooled
// tokens, M_t = u_t c_t^T, s_t(n) the weight of token n, l_t(n) its label, P = M_2 ... M_T (identity for
// T = 1), and d before a name is its gradient. The launches in order:
//   icm            products        keys of round 1; y_1 = mean Wv_1^T + bv_1, the values behind round 1
//                  grad_tokens     paper: dS, S . dS, parts of dR_T, U = dS^T u_1 and dP
//                                  released: dot products of the chains, parts of dR_T
//                  grad_late       dZ, by the rounds T .. 2; paper: dKc_1 and Q = P^T c_1
//                  products        g_T = dZ_(T+1), g_(t-1) = dZ_t Wk_t + g_t Wv_t, d mean = g_1 Wv_1
//   released, and  grad_cosines    da, of the cosine of each token with its own centre
//   `cluster`      grad_centres    dKc_1
//   all            grad_rows       dK_1 with the pooled part, and the means' part of dx or dv
//   icm            products        dx, and the weights' sums in parts
//                  sum_grads       gradients of weights, biases and gates
#pragma once
#include "cluster/cuda/chain.h"

namespace frd {
namespace chain {

struct GradArgs {
  int batch, channels, count;
  bool dense;  // variant paper: count means, products of all cosines
  bool
      weighted;  // released, or `cluster` by similarity: the means' weights are s = sigmoid(beta + alpha cos)
  Round round[kMaxRounds];
  Saved layout;
  int64_t label_stride;
  const int32_t* labels;         // [B, label_stride]; below 0: a masked token, of `cluster`
  const float* saved;            // [B, layout.size]
  const float *alpha, *beta;     // [1], released [T]
  TokenView values;              // [B, N, C] x, or v
  TokenView keys;                // [B, N, C] of round 1: x or k itself, or float rows of the workspace
  TokenView grad;                // [B, N, C] of the output, in x's dtype; icm alone
  const float* similarity_grad;  // [B, N] with any strides; `cluster` alone
  int64_t similarity_batch, similarity_token;

  // The sweeps over tokens: an item's tokens in `chunks` runs of chunk_tokens, a multiple of 32.
  int chunks, chunk_tokens;

  // Workspace, of float. Null where a variant has no use for it.
  float* score_grad;     // [B, N, J] dS, paper
  float* radial;         // [B, N] sum over j of S dS, paper
  float* last_parts;     // [B, chunks, J, C] dR_T
  float* unit_parts;     // [B, chunks, J, C] U, paper
  float* product_parts;  // [B, chunks, O_1, J] dP, paper
  float* chain_parts;    // [B, chunks, O_1] released: sum of dw s_1 over the tokens of a label, where
                         // dw(n) = dF(n) . R_T(end of its chain)
  float* late;           // [B, late_stride] of grad_late alone, size by late_grad_size()
  int64_t late_stride;
  float* rows_grad;  // [B, O_1, rows_grad_row] dZ in the first T C columns; g_1 .. g_(T-1) behind them
  int64_t rows_grad_row;
  float* mean_grad;  // [B, O_1, C], row stride mean_grad_row: d mean; of `cluster` d centres
  int64_t mean_grad_row;
  float* query;        // [B, J, C] Q, paper
  float* cosine_grad;  // [B, N] released and `cluster`: da. Before grad_cosines released has the part of ds_1
                       // that comes from the dispatch in it, dw times the later weights of the chain.
  float* pooled_grad;  // [B, O_1, C] dKc_1
  float* bin_share;    // [B, O_1] 1 / tokens of the bin that are not masked; 0 for an empty bin
  float* gate_parts;   // [gates, B chunks, 2] parts of (dalpha, dbeta). Gate 0: all of them; gate t > 0
                       // (released): the first B, one for each item

  FRD_HD int tokens() const { return round[0].tokens(); }
  FRD_HD int centres() const { return round[0].centres(); }
  FRD_HD int last() const { return round[count - 1].centres(); }  // J
};

// A launch, or a few.
//
// arg = (dF R_T^T) g (1 - g), g = sigmoid(alpha S + beta), S = M_1 P; dS = alpha arg; dR_T = g^T dF
cudaError_t grad_tokens(const GradArgs& a, cudaStream_t stream);
// Reads the parts and `saved`; writes rows_grad; paper: query, pooled_grad, bin_share; released: gate_parts
// of the rounds t > 0.
cudaError_t grad_late(const GradArgs& a, cudaStream_t stream);
int64_t late_grad_size(const GradArgs& a);  // floats of an item's scratch; 0 if it is in shared memory
// ds = cosine_grad (of `cluster`: similarity_grad) + [weighted] scale_o dmean_o . (v - mean_o), o = l(n);
// da = alpha s (1 - s) ds, or ds without weights. Writes cosine_grad and, with weights, gate 0; a masked
// token gets 0, and nothing of it is read.
cudaError_t grad_cosines(const GradArgs& a, cudaStream_t stream);
// dc_o = sum of da u over the tokens of label o; c . dc = sum of da cos. Writes pooled_grad and bin_share.
cudaError_t grad_centres(const GradArgs& a, cudaStream_t stream);

// Tokens of a block of grad_rows, whose sum of dK is one part: at most so many, as the parts get many.
constexpr int kMaxRunTokens = 128;
FRD_HD inline int run_tokens(const GradArgs& a) {
  constexpr int kLeast = 16, kBlocks = 1024;
  const int64_t runs = int64_t{a.batch} * ((a.tokens() + kLeast - 1) / kLeast);
  const int64_t tokens = (runs / kBlocks + 1) * kLeast;
  return tokens < kMaxRunTokens ? static_cast<int>(tokens) : kMaxRunTokens;
}
FRD_HD inline int token_runs(const GradArgs& a) { return (a.tokens() + run_tokens(a) - 1) / run_tokens(a); }
constexpr int kSumRows = 32;  // rows of rows_grad of a part of their sums

// What grad_rows writes, all in the dtype of the keys.
struct GradRows {
  TokenView keys;    // [B, N, C] dK_1
  TokenView values;  // [B, N, C] the means' part of dx, or dv; data null: added to `keys`
  float* key_sums;   // [B token_runs, C] sums of dK_1 over a block's tokens, or null
  float* row_sums;   // [ceil(B O_1 / kSumRows), rows_grad_row] sums of rows_grad, or null
};
// dK = inv_norm (E - u radial) + sum over its bins of share dKc; E = dS Q or da c_l, radial = dS . S or da
// cos dV = sum over its bins of share h + s h_l, where h = scale dmean
cudaError_t grad_rows(const GradArgs& a, const GradRows& to, cudaStream_t stream);

// to [B O_1, C] = left + right, all of row stride rows_grad_row
cudaError_t add_rows(const GradArgs& a, const float* left, const float* right, float* to,
                     cudaStream_t stream);

// to[i] = from[i] + from[i + stride] + ..., `parts` of them, in order; no part gives 0.
struct PartSum {
  const float* from;
  int parts, size;
  int64_t stride;
  void* to;
  DType dtype;
};
constexpr int kMaxSums = 6 * kMaxRounds;
struct PartSums {
  int count;
  PartSum sum[kMaxSums];
};
cudaError_t sum_grads(const PartSums& sums, cudaStream_t stream);

}  // namespace chain
}  // namespace frd
