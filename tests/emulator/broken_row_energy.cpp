// A small kernel that is right, and wrong on request: the emulator's own test.
#include <cmath>
#include <cstdio>
#include <vector>

#include "core/cuda_compat.h"

#ifdef OUT_OF_BOUNDS_WRITE
constexpr int kBeyond = 1;
#else
constexpr int kBeyond = 0;
#endif

// x [rows, cols] -> out [rows]: sum of squared central differences of each row; one block per row.
__global__ void row_energy(const float* __restrict__ x, float* __restrict__ out, int cols) {
  FRD_DYNAMIC_SHARED(float, row);
  __shared__ float partial[32];
  for (int c = threadIdx.x; c < cols + kBeyond; c += blockDim.x)
    row[c] = c < cols ? x[blockIdx.x * cols + c] : 0.f;
#ifndef FORGET_BARRIER
  __syncthreads();
#endif
  float sum = 0.f;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
#ifdef OUT_OF_BOUNDS_READ
    const float right = x[blockIdx.x * cols + c + 1];
#else
    const float right = c + 1 < cols ? row[c + 1] : 0.f;
#endif
    const float left = c > 0 ? row[c - 1] : 0.f;
    sum += (right - left) * (right - left);
  }
  for (int m = 16; m > 0; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

// Of memory that the caller has allocated; also for other processes that load this as a library.
extern "C" void row_energies(const float* x, float* out, int rows, int cols, unsigned seed) {
  emu::launch(row_energy, dim3(rows), dim3(96), cols * sizeof(float), seed, x, out, cols);
}

int main() {
  const int rows = 5, cols = 203;
  std::vector<float> x(rows * cols);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.37f * i);
  int wrong = 0;
  for (unsigned seed = 0; seed < 5; ++seed) {
    std::vector<float> out(rows, NAN);
    row_energies(x.data(), out.data(), rows, cols, seed);
    for (int r = 0; r < rows; ++r) {
      double want = 0;
      for (int c = 0; c < cols; ++c) {
        const double right = c + 1 < cols ? x[r * cols + c + 1] : 0, left = c > 0 ? x[r * cols + c - 1] : 0;
        want += (right - left) * (right - left);
      }
      wrong += !(std::fabs(out[r] - want) < 1e-3 * want);
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
