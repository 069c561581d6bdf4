// Backward pass of a round, as stages over independent units; the order here is the order of running.
#pragma once
#include "core/isa.h"
#include "icm/round.h"

namespace frd {

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

}  // namespace frd

FRD_ISA_TABLE(RoundGradKernels, round_grad_kernels)
