// The weight transform's CUDA kernel on the CPU: every kind, both directions, several thread schedules.
#include <cmath>
#include <cstdio>
#include <vector>

#include "pdc/cuda/weight.cu"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

template <PdcKind kind, bool kTransposed>
int check(int64_t pairs, unsigned seed) {
  constexpr int taps = kernel_side(kind) * kernel_side(kind);
  constexpr int n_in = kTransposed ? taps : kPdcWeights, n_out = kTransposed ? kPdcWeights : taps;
  const double theta = 0.6;
  std::vector<float> in(pairs * n_in), out(pairs * n_out, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = std::sin(0.37f * i);
  const unsigned blocks = (pairs + kPdcWeightThreads - 1) / kPdcWeightThreads;
  emu::launch(pdc_weight_kernel<kind, float, float, kTransposed>, dim3(blocks), dim3(kPdcWeightThreads), 0,
              seed, in.data(), out.data(), pairs, theta);
  int wrong = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    double source[n_in], want[n_out];
    for (int i = 0; i < n_in; ++i) source[i] = in[p * n_in + i];
    if constexpr (kTransposed)
      transform_transposed<kind>(source, theta, want);
    else
      transform<kind>(source, theta, want);
    for (int i = 0; i < n_out; ++i) wrong += !(std::fabs(out[p * n_out + i] - want[i]) < 1e-5);
  }
  return wrong;
}

int main() {
  int wrong = 0;
  for (int kind = 0; kind < 4; ++kind)
    with_kind(static_cast<PdcKind>(kind), [&](auto tag) {
      for (unsigned seed = 0; seed < 3; ++seed)
        for (int64_t pairs : {1, 127, 300})
          wrong += check<decltype(tag)::value, false>(pairs, seed) +
                   check<decltype(tag)::value, true>(pairs, seed);
    });
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
