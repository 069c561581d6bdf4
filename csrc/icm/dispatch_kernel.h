// From the centres of the last round back to the tokens, forward and backward, as stages over independent
// units.
#pragma once
#include "core/isa.h"
#include "icm/round.h"

namespace frd {

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

}  // namespace frd

FRD_ISA_TABLE(DispatchKernels, dispatch_kernels)
