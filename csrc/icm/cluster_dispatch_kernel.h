// From given centres back to the tokens, and its gradient, as stages over independent units.
#pragma once
#include "core/isa.h"
#include "icm/round.h"

namespace frd {

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

FRD_ISA_TABLE(ClusterDispatchKernels, cluster_dispatch_kernels)
