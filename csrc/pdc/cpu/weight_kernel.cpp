#include "pdc/cpu/kernel.h"

#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {
namespace FRD_ISA {
namespace {

// v[plus_k] += w_k, v[minus_k] -= theta w_k, then rounded to Out. Computes in double only if the source is
// double: a float32 master weight is transformed in float32.
template <PdcKind kind, typename In, typename Out>
void forward_pairs(const PdcWeightArgs& a, int64_t begin, int64_t end) {
  constexpr int taps = kernel_side(kind) * kernel_side(kind);
  const In* in = static_cast<const In*>(a.in);
  Out* out = static_cast<Out*>(a.out);
  for (int64_t i = begin; i < end; ++i) {
    compute_t<In> w[kPdcWeights], v[taps];
    compute_t<Out> rounded[taps];
    for (int k = 0; k < kPdcWeights; ++k) w[k] = load(in[i * kPdcWeights + k]);
    transform<kind>(w, static_cast<compute_t<In>>(a.theta), v);
    for (int k = 0; k < taps; ++k) rounded[k] = static_cast<compute_t<Out>>(v[k]);
    round_taps<kind, Out>(rounded, a.theta, out + i * taps);
  }
}

// w_k = v[plus_k] - theta v[minus_k].
template <PdcKind kind, typename In, typename Out>
void transposed_pairs(const PdcWeightArgs& a, int64_t begin, int64_t end) {
  constexpr int taps = kernel_side(kind) * kernel_side(kind);
  using A = compute_t<Out>;
  const In* in = static_cast<const In*>(a.in);
  Out* out = static_cast<Out*>(a.out);
  for (int64_t i = begin; i < end; ++i) {
    A v[taps], w[kPdcWeights];
    for (int k = 0; k < taps; ++k) v[k] = static_cast<A>(load(in[i * taps + k]));
    transform_transposed<kind>(v, static_cast<A>(a.theta), w);
    for (int k = 0; k < kPdcWeights; ++k) store(out[i * kPdcWeights + k], w[k]);
  }
}

template <typename F>
void dispatch(const PdcWeightArgs& a, F f) {
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.in_dtype, [&](auto in) { with_dtype(a.out_dtype, [&](auto out) { f(kind, in, out); }); });
  });
}

void forward(const PdcWeightArgs& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto kind, auto in, auto out) {
    forward_pairs<decltype(kind)::value, decltype(in), decltype(out)>(a, begin, end);
  });
}

void transposed(const PdcWeightArgs& a, int64_t begin, int64_t end) {
  dispatch(a, [&](auto kind, auto in, auto out) {
    transposed_pairs<decltype(kind)::value, decltype(in), decltype(out)>(a, begin, end);
  });
}

}  // namespace

const PdcWeightKernels& pdc_weight_kernels() {
  static const PdcWeightKernels table{forward, transposed};
  return table;
}

}  // namespace FRD_ISA
}  // namespace frd
