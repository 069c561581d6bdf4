// The CPU kernels of the clustering and their arguments, without torch. A kernel is a sequence of stages;
// each stage runs over tasks begin <= task < end, which are independent of each other.
#pragma once
#include <cstdint>

#include "cluster/common.h"
#include "core/isa.h"

namespace frd {

// Memory with one block per sample of the batch: that of sample b begins at data + b * stride.
template <class A>
struct PerSample {
  A* data = nullptr;
  int64_t stride = 0;
  A* operator[](int64_t b) const { return data + b * stride; }
};

// Centres of one task.
constexpr int64_t kCentreBlock = 32;

// One round of clustering: B samples of N = height * width tokens with C channels and a grid of O =
// grid_height * grid_width centres. A is the compute type. Per token n with own centre o = argmax_o
// cos(key_n, key_o):
//   weight_n = 1 or sigmoid(beta + alpha cos_n)
//   mean_o = (pooled_o + sum_n weight_n value_n) / (1 + sum_n weight_n)
// Keys and values are given, or are projections of the same tokens; a null projection is the identity.
template <class A>
struct ClusterRound {
  int64_t batch, channels, height, width, grid_height, grid_width;
  // A pass over the tokens of a sample is cut into so many chunks: a function of N and O only.
  int64_t chunks;

  TokenView keys, values;  // [B, N, C]
  // Keys and values come from the same tokens, which are pooled once.
  bool shared;

  const A* key_weight;    // Wk [C, C] (output, input), or null
  const A* key_packed;    // transpose of Wk, packed for the GEMM
  const A* key_bias;      // bk [C]
  const A* value_packed;  // transpose of Wv [C, C], packed for the GEMM, or null
  const A* value_bias;    // bv [C]

  // Whether tokens have the weight sigmoid(beta + alpha * cosine), not 1.
  bool weighted;
  A alpha, beta;
  // The argmax is over the cosines times the sign of `order`.
  A order = 1;

  // Whether tokens labelled -1 before the round are left out; without a mask there are none.
  bool has_mask = false;

  // Saved for the backward pass.
  PerSample<int32_t> labels;     // [N] own centre; -1 for a token outside the mask
  PerSample<A> cosine;           // [N] cosine with the own centre
  PerSample<A> inv_norm;         // [N] 1 / max(norm of the key, kNormFloor)
  PerSample<A> pooled;           // [O, C] bin means of the values' tokens
  PerSample<A> unit_key;         // [O, C] keys of the pooled tokens, divided by their norms
  PerSample<A> pooled_inv_norm;  // [O] 1 / max(norm of the pooled key, kNormFloor)
  PerSample<A> mean;             // [O, C] (pooled + weighted sum of the cluster's tokens) / weight_sum
  PerSample<A> weight_sum;       // [O] 1 + sum of the cluster's weights
  PerSample<A> inv_bin_count;    // [O] 1 / tokens of the bin, 0 if it has none
  PerSample<A> result;           // [O, C] projected means: the centres of the round

  // Further results of the operator `cluster`.
  PerSample<A> similarity;    // [N] with the own centre
  PerSample<int32_t> counts;  // [O]
  TokenView result_view;      // [B, O, C] the centres in the dtype of the values

  // Workspace.
  PerSample<A> pooled_keys;      // [O, C] bin means of the keys' tokens; the same as `pooled` if shared
  PerSample<A> unit_key_packed;  // transpose of `unit_key` [C, O], packed for the GEMM
  PerSample<A> chunk_sums;       // [chunks, O, C] weighted sums of tokens
  PerSample<A> chunk_weights;    // [chunks, O] sums of weights

  int64_t tokens() const { return height * width; }
  int64_t centres() const { return grid_height * grid_width; }
  int64_t blocks() const { return (centres() + kCentreBlock - 1) / kCentreBlock; }
  // Whether token n of sample b takes part. Other tokens may hold NaN, so skip them instead of multiplying by
  // 0.
  bool in_mask(int64_t b, int64_t n) const { return !has_mask || labels[b][n] >= 0; }
};

// Dense dispatch (Eq. 4): out = sigmoid(alpha * S + beta) R, where S [N, J] is the product of the rounds'
// cosines and R [J, C] the centres of the last round. S = unit keys * Q with a Q [C, J] made from the later
// rounds, so it is computed token by token and never stored.
template <class A>
struct DenseDispatch {
  int64_t last_centres;    // J
  PerSample<A> projected;  // [J, C] Q^T Wk
  PerSample<A> offset;     // [J] Q^T bk
  PerSample<A> last;       // [J, C] R
  A alpha, beta;
  TokenView grad;  // [B, N, C] of the output
};

// Gradients of one round: from those of its centres and similarities to those of its tokens and parameters.
template <class A>
struct ClusterRoundGrad {
  const A* key_packed;    // Wk [C, C] (output, input), packed for the GEMM, or null
  const A* value_packed;  // Wv likewise

  // The gradient of the tokens' keys comes from their own similarity or, if dense, from the product of
  // cosines P [N, J] = unit keys * Q, which is given or, in the first round, computed token by token.
  bool dense;
  int64_t last_centres;              // J
  PerSample<A> query;                // [J, C] Q^T
  PerSample<A> product;              // [N, J] P
  PerSample<A> product_grad;         // [N, J]
  const DenseDispatch<A>* dispatch;  // first round: computes product and product_grad

  PerSample<A> result_grad;      // [O, C] of the centres
  PerSample<A> mean_grad;        // [O, C] of the mean, divided by weight_sum
  PerSample<A> mean_dot;         // [O] mean . mean_grad
  PerSample<A> similarity_grad;  // [N] of the own similarity
  PerSample<A> dcos;             // [N] gradient of the own cosine, times inv_norm
  PerSample<A> dcos_key_sums;    // [chunks, O, C] sums of dcos * key's token over the cluster
  PerSample<A> dcos_sums;        // [chunks, O] sums of dcos
  PerSample<A> gate_grad;        // [chunks, 2] of alpha and beta
  PerSample<A> unit_key_grad;    // [O, C] of `unit_key`; given if dense
  PerSample<A> pooled_key_grad;  // [O, C] of the keys of the pooled tokens
  PerSample<A> pooled_grad;      // [O, C] of the pooled tokens; if not shared, of the pooled keys

  TokenView keys_grad;    // [B, N, C]; if shared, of the tokens
  TokenView values_grad;  // [B, N, C]; unused if shared

  // The part of Wk's gradient that comes from the tokens is summed in so many groups: a function of shapes
  // only.
  int64_t groups;
  A* key_weight_sums;          // [groups, C, C]
  A* key_bias_sums;            // [groups, C]
  PerSample<A> pooled_packed;  // `pooled` [O, C], packed for the GEMM
  PerSample<A> mean_packed;    // `mean` likewise
  TokenView weight_grad[2];    // Wk's, Wv's [1, C, C]
  TokenView bias_grad[2];      // bk's, bv's [1, 1, C]
};

// Stages of the forward pass of a round, in order.
template <class A>
struct RoundOps {
  using Stage = void (*)(const ClusterRound<A>& round, int64_t begin, int64_t end);
  // Tasks of centre_keys per sample.
  int64_t (*key_panels)(int64_t centres);
  // Elements of a packed [k, n] matrix.
  int64_t (*packed_size)(int64_t k, int64_t n);
  // Packs [k, n], whose element (i, j) is at in[i * rs + j * cs].
  void (*pack)(const A* in, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed);
  Stage pool;            // B * grid_height tasks: pooled, inv_bin_count
  Stage centre_keys;     // B * key_panels(O) tasks: unit_key, pooled_inv_norm
  Stage assign;          // B * chunks tasks: labels, cosine, inv_norm, chunk_sums, chunk_weights
  Stage update_centres;  // B * blocks tasks: mean, weight_sum, result
  Stage write_results;   // B tasks: the further results of `cluster`
};

struct RoundKernels {
  RoundOps<float> f32;
  RoundOps<double> f64;
};

// Stages of the backward pass of a round, in order.
template <class A>
struct RoundGradOps {
  using Stage = void (*)(const ClusterRound<A>& round, const ClusterRoundGrad<A>& grad, int64_t begin,
                         int64_t end);
  Stage mean_grad;        // B * blocks tasks: mean_grad, mean_dot
  Stage dcos;             // B * chunks tasks, unless dense: dcos, dcos_key_sums, dcos_sums, gate_grad
  Stage pooled_key_grad;  // B * blocks tasks: pooled_key_grad, pooled_grad
  Stage token_grad;       // `groups` tasks: keys_grad, values_grad, key_weight_sums, key_bias_sums
  Stage pack_means;       // B tasks: pooled_packed, mean_packed
  Stage weight_grad;      // 2 * ceil(C / kCentreBlock) tasks: weight_grad, bias_grad
};

struct RoundGradKernels {
  RoundGradOps<float> f32;
  RoundGradOps<double> f64;
};

// The ICM's dispatch from the J centres of the last round to the tokens, forward and backward.
template <class A>
struct IcmDispatch {
  // Number of rounds.
  int64_t count;
  const ClusterRound<A>* rounds;
  TokenView out;  // [B, N, C]

  // Paper (dense), per round t: the product of the cosines of the rounds from t on is
  // P_t = inv_norm * (tokens * projected^T + offset); P_1 is S.
  PerSample<A>* query;      // [J, C] Q^T, by which the unit keys of round t are multiplied
  PerSample<A>* projected;  // [J, C] Q^T Wk
  PerSample<A>* offset;     // [J] Q^T bk
  PerSample<A>* product;    // [tokens, J] P_t; none for round 1
  DenseDispatch<A> dense;

  // Gradients.
  TokenView grad;                        // [B, N, C] of the output
  const ClusterRoundGrad<A>* gradients;  // per round
  // Released: [chunks, O_1, C], weighted sums of grad over the clusters of round 1. Paper: [chunks, J, C],
  // sums of grad weighted by the dispatch.
  PerSample<A> grad_sums;
  // Paper.
  PerSample<A> query_sums;       // [chunks, J, C] sums of tokens weighted by the gradient of S
  PerSample<A> query_dcos_sums;  // [chunks, J] sums of these weights
  PerSample<A> gate_grad;        // [chunks, 2] of alpha and beta
};

template <class A>
struct IcmDispatchOps {
  using Stage = void (*)(const IcmDispatch<A>& dispatch, int64_t begin, int64_t end);
  // Paper.
  Stage queries;            // B tasks: query, projected, offset, product of every round
  Stage dense;              // B * chunks tasks of round 1: out
  Stage dense_grad_sums;    // B * chunks tasks: grad_sums, query_sums, query_dcos_sums, gate_grad
  Stage dense_centre_grad;  // B tasks: gradients of the last centres and of every round's unit keys, products
  // Released.
  Stage masked;              // B * chunks tasks of round 1: out
  Stage masked_grad_sums;    // B * chunks tasks: grad_sums, gradient of round 1's similarities
  Stage masked_centre_grad;  // B tasks: gradients of the last centres and of the later rounds' similarities
};

struct IcmDispatchKernels {
  IcmDispatchOps<float> f32;
  IcmDispatchOps<double> f64;
};

// The operator `cluster_dispatch` and its gradient: out_n = similarity_n * centre[label_n]. A token labelled
// -1 gets 0 and passes no gradient. A is the compute type.
template <class A>
struct ClusterDispatch {
  int64_t batch, tokens, channels, centres;
  // A pass over the tokens of a sample is cut into so many chunks: a function of N and O only.
  int64_t chunks;

  TokenView centre_rows;      // [B, O, C]
  PerSample<int32_t> labels;  // [N]
  PerSample<A> similarity;    // [N]
  TokenView out;              // [B, N, C]

  TokenView grad;                // [B, N, C] of the output
  PerSample<A> similarity_grad;  // [N]
  TokenView centre_grad;         // [B, O, C]
  PerSample<A> chunk_sums;       // workspace [chunks, O, C]: sums of similarity * grad over each cluster

  int64_t blocks() const { return (centres + kCentreBlock - 1) / kCentreBlock; }
};

template <class A>
struct ClusterDispatchOps {
  using Stage = void (*)(const ClusterDispatch<A>& dispatch, int64_t begin, int64_t end);
  Stage forward;      // B * chunks tasks: out
  Stage grad_sums;    // B * chunks tasks: chunk_sums, similarity_grad
  Stage centre_grad;  // B * blocks tasks: centre_grad
};

struct ClusterDispatchKernels {
  ClusterDispatchOps<float> f32;
  ClusterDispatchOps<double> f64;
};

}  // namespace frd

FRD_ISA_TABLE(RoundKernels, round_kernels)
FRD_ISA_TABLE(RoundGradKernels, round_grad_kernels)
FRD_ISA_TABLE(IcmDispatchKernels, icm_dispatch_kernels)
FRD_ISA_TABLE(ClusterDispatchKernels, cluster_dispatch_kernels)
