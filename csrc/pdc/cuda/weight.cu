// The weight transform v[plus_k] += w_k, v[minus_k] -= theta w_k and its transpose.
#include "core/cuda_compat.h"
#include "pdc/cuda/launch.h"

namespace frd {
namespace {

constexpr int kPdcWeightThreads = 128;

// in [pairs, 9 or side * side] -> out. One thread transforms one pair of channels. The pairs of a block are
// contiguous, so they pass through shared memory to be read and written coalesced; the odd strides 9 and 25
// keep the threads' accesses there free of bank conflicts.
template <PdcKind kind, typename In, typename Out, bool kTransposed>
__global__ void __launch_bounds__(kPdcWeightThreads)
    pdc_weight_kernel(const In* __restrict__ in, Out* __restrict__ out, int64_t pairs, double theta) {
  constexpr int kTaps = kernel_side(kind) * kernel_side(kind);
  constexpr int kIn = kTransposed ? kTaps : kPdcWeights;
  constexpr int kOut = kTransposed ? kPdcWeights : kTaps;
  using A = compute_t<In>;
  __shared__ In staged_in[kPdcWeightThreads * kIn];
  __shared__ Out staged_out[kPdcWeightThreads * kOut];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPdcWeightThreads;
  const int count = static_cast<int>(pairs - first < kPdcWeightThreads ? pairs - first : kPdcWeightThreads);
  for (int i = threadIdx.x; i < count * kIn; i += kPdcWeightThreads) staged_in[i] = in[first * kIn + i];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    A source[kIn], result[kOut];
    for (int i = 0; i < kIn; ++i) source[i] = load(staged_in[threadIdx.x * kIn + i]);
    Out* target = staged_out + threadIdx.x * kOut;
    if constexpr (kTransposed) {
      transform_transposed<kind>(source, static_cast<A>(theta), result);
      for (int i = 0; i < kOut; ++i) store(target[i], static_cast<compute_t<Out>>(result[i]));
    } else {
      transform<kind>(source, static_cast<A>(theta), result);
      compute_t<Out> rounded[kOut];
      for (int i = 0; i < kOut; ++i) rounded[i] = static_cast<compute_t<Out>>(result[i]);
      round_taps<kind, Out>(rounded, theta, target);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kOut; i += kPdcWeightThreads) out[first * kOut + i] = staged_out[i];
}

template <bool kTransposed>
cudaError_t launch(const PdcWeightArgs& a, int64_t pairs, cudaStream_t stream) {
  if (pairs == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((pairs + kPdcWeightThreads - 1) / kPdcWeightThreads);
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.in_dtype, [&](auto in) {
      with_dtype(a.out_dtype, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        FRD_LAUNCH((pdc_weight_kernel<decltype(kind)::value, In, Out, kTransposed>), blocks,
                   kPdcWeightThreads, 0, stream, static_cast<const In*>(a.in), static_cast<Out*>(a.out),
                   pairs, a.theta);
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t pdc_weight_forward_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream) {
  return launch<false>(args, pairs, stream);
}

cudaError_t pdc_weight_transposed_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream) {
  return launch<true>(args, pairs, stream);
}

}  // namespace frd
