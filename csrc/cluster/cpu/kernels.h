// The CPU kernels of the clustering, as stages; each runs over units begin <= u < end, which do not depend on
// each other.
#pragma once
#include "cluster/cpu/round.h"
#include "core/isa.h"

namespace frd {

// Forward pass of a round, as stages.
template <class A>
struct RoundOps {
  using Stage = void (*)(const Round<A>& round, int64_t begin, int64_t end);
  int64_t (*key_panels)(int64_t centres);        // units of centre_keys for an item
  int64_t (*packed_size)(int64_t k, int64_t n);  // elements of a packed [k, n] matrix
  // packs [k, n] with element (i, j) at in[i * rs + j * cs]
  void (*pack)(const A* in, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed);
  Stage pool;         // B * rows units: bin means
  Stage centre_keys;  // B * key_panels(O) units: unit keys of the pooled tokens
  Stage assign;       // B * chunks units: labels, cosines, and the clusters' sums
  Stage finish;       // B * blocks units: means and centres
  Stage publish;      // B units: the results of `cluster`
};

struct RoundKernels {
  RoundOps<float> f32;
  RoundOps<double> f64;
};

// Backward pass of a round, in the order of running.
template <class A>
struct RoundGradOps {
  using Stage = void (*)(const Round<A>& round, const RoundGrad<A>& grad, int64_t begin, int64_t end);
  Stage mean_grad;    // B * blocks units
  Stage pulls;        // B * chunks units, not where dense: `pull`, `sums`, `pulls`, `gate_grad`
  Stage centre_grad;  // B * blocks units: `centre_grad`, `pooled_grad`
  Stage token_grad;   // `groups` units: gradients of the tokens, `weight_sums`, `bias_sums`
  Stage pack_means;   // B units: `pooled_packed`, `mean_packed`
  Stage weight_grad;  // 2 * ceil(C / kCentreBlock) units: gradients of the projections
};

struct RoundGradKernels {
  RoundGradOps<float> f32;
  RoundGradOps<double> f64;
};

// The ICM's dispatch from the centres of the last round to the tokens, forward and backward.
// `rounds` rounds; J = centres of the last one.
template <class A>
struct Dispatch {
  int64_t count;
  const Round<A>* rounds;
  TokenView out;  // [B, N, C]

  // Paper, per round t: S of round 1 is scale * (tokens * projected^T + offset), likewise the product P of
  // the cosines of the rounds from t on.
  PerItem<A>* query;      // [J, C] Q^T, what the unit keys of round t are multiplied with
  PerItem<A>* projected;  // [J, C] Q^T Wk
  PerItem<A>* offset;     // [J] Q^T bk
  PerItem<A>* product;    // [tokens, J]; none for round 1
  DenseDispatch<A> dense;

  // Gradients.
  TokenView grad;                 // [B, N, C] of the output
  const RoundGrad<A>* gradients;  // per round
  PerItem<A> sums;         // released [chunks, O_1, C]: weighted sums of `grad` over the clusters of round 1;
                           // paper [chunks, J, C]: of `grad`, weighted by the dispatch
  PerItem<A> query_sums;   // paper [chunks, J, C] sums of tokens, weighted by the gradient of S
  PerItem<A> query_pulls;  // paper [chunks, J] the sums of these weights
  PerItem<A> gate_grad;    // paper [chunks, 2] of alpha and beta
};

template <class A>
struct DispatchOps {
  using Stage = void (*)(const Dispatch<A>& dispatch, int64_t begin, int64_t end);
  Stage queries;        // paper, B units: query, projected, offset and product of every round
  Stage dense;          // paper, B * chunks units of round 1: the output
  Stage masked;         // released, likewise
  Stage dense_sums;     // paper, B * chunks units: `sums`, `query_sums`, `query_pulls`, `gate_grad`
  Stage masked_sums;    // released, B * chunks units: `sums`, the gradient of round 1's similarities
  Stage dense_centres;  // paper, B units: gradients of the last centres, of every round's unit keys and
                        // products
  Stage
      masked_centres;  // released, B units: gradients of the last centres, of the later rounds' similarities
};

struct DispatchKernels {
  DispatchOps<float> f32;
  DispatchOps<double> f64;
};

// The operator `cluster_dispatch`: from given centres to the tokens, and its gradient.
// out = similarity * own centre; a token labelled -1 gets 0 and passes no gradient. A is the type of all
// sums.
template <class A>
struct ClusterDispatch {
  int64_t batch, tokens, channels, centres;
  int64_t chunks;  // a pass over an item's tokens runs in so many pieces: a function of N and O only

  TokenView rows;           // [B, O, C] the centres
  PerItem<int32_t> labels;  // [N]
  PerItem<A> similarity;    // [N]
  TokenView out;            // [B, N, C]

  TokenView grad;              // [B, N, C] of the output
  PerItem<A> similarity_grad;  // [N]
  TokenView rows_grad;         // [B, O, C]
  PerItem<A> sums;             // workspace [chunks, O, C]: of similarity * grad over each centre's tokens

  int64_t blocks() const { return (centres + kCentreBlock - 1) / kCentreBlock; }
};

template <class A>
struct ClusterDispatchOps {
  using Stage = void (*)(const ClusterDispatch<A>& dispatch, int64_t begin, int64_t end);
  Stage forward;    // B * chunks units
  Stage sum;        // B * chunks units: `sums`, `similarity_grad`
  Stage rows_grad;  // B * blocks units: the chunks' sums
};

struct ClusterDispatchKernels {
  ClusterDispatchOps<float> f32;
  ClusterDispatchOps<double> f64;
};

}  // namespace frd

FRD_ISA_TABLE(RoundKernels, round_kernels)
FRD_ISA_TABLE(RoundGradKernels, round_grad_kernels)
FRD_ISA_TABLE(DispatchKernels, dispatch_kernels)
FRD_ISA_TABLE(ClusterDispatchKernels, cluster_dispatch_kernels)
