// A kernel of clusters with faults to switch on, for the test of the emulator itself: every block adds the
// numbers of all blocks of its cluster, in order of rank.
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/team.cuh"

using namespace frd;

template <int kBlocks>
__global__ void cluster_sum(const float* in, float* out) {
  using T = Team<kBlocks>;
  FRD_DYNAMIC_SHARED(float, mine);
  mine[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
#if !defined(FORGET_FIRST_BARRIER)
  T::sync();
#endif
  float sum = 0;
  for (int rank = 0; rank < kBlocks; ++rank) sum += T::peer(mine, rank)[(threadIdx.x + 1) % blockDim.x];
#if !defined(FORGET_LAST_BARRIER)
  T::sync();
#endif
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

template <int kBlocks>
int wrong_sums(unsigned seed) {
  constexpr int threads = 64, samples = 3;
  std::vector<float> in(samples * kBlocks * threads), out(in.size(), NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 97);
  emu::launch_cluster(cluster_sum<kBlocks>, kBlocks, dim3(samples * kBlocks), dim3(threads),
                      threads * sizeof(float), seed, in.data(), out.data());
  int wrong = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t sample = i / threads / kBlocks, next = (i % threads + 1) % threads;
    float sum = 0;
    for (int rank = 0; rank < kBlocks; ++rank) sum += in[(sample * kBlocks + rank) * threads + next];
    wrong += out[i] != sum;
  }
  return wrong;
}

int main() {
  int wrong = 0;
  for (unsigned seed = 0; seed < 4; ++seed)
    wrong += wrong_sums<8>(seed) + wrong_sums<2>(seed) + wrong_sums<1>(seed);
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
