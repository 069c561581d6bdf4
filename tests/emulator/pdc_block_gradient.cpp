// The gradient of the 1x1 weight, and the stand-ins for the instructions that the block's kernels use.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "pdc_block/cuda/point_grad.cuh"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace {

std::mt19937 generator(1);

template <class T>
std::vector<T> numbers(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<T> result(count);
  for (T& v : result) store(v, normal(generator));
  return result;
}
template <class T>
std::vector<T> nans(int64_t count) {
  std::vector<T> result(count);
  for (T& v : result) store(v, NAN);
  return result;
}

// One warp: d [16, 8] += a [16, depth] b [depth, 8] through ldmatrix, plain or transposed, and mma.
template <class T>
__global__ void multiply(const T* a, const T* b, float* d, bool transposed) {
  constexpr int depth = 32 / sizeof(T);
  FRD_DYNAMIC_SHARED(T, shared);  // a [16, depth] or [depth, 16], b [8, depth] or [depth, 8]
  for (int i = threadIdx.x; i < 24 * depth; i += 32) shared[i] = i < 16 * depth ? a[i] : b[i - 16 * depth];
  __syncwarp();
  const int lane = threadIdx.x, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
  uint32_t x[4], y[2];
  if (transposed) {
    ldmatrix<4, true>(x, shared + (high * 8 + row) * 16 + low * 8);
    ldmatrix<2, true>(y, shared + 16 * depth + (low * 8 + row) * 8);
  } else {
    ldmatrix<4>(x, shared + (low * 8 + row) * depth + high * depth / 2);
    ldmatrix<2>(y, shared + 16 * depth + row * depth + low * depth / 2);
  }
  float sum[4] = {1, 2, 3, 4};
  if constexpr (sizeof(T) == 4)
    mma_m16n8k8_tf32(sum, x, y[0], y[1]);
  else
    mma_m16n8k16<T>(sum, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <class T>
int check_mma(bool transposed) {
  constexpr int depth = 32 / sizeof(T);
  const std::vector<T> a = numbers<T>(16 * depth), b = numbers<T>(8 * depth);
  std::vector<float> d(128, NAN);
  emu::launch(multiply<T>, dim3(1), dim3(32), 24 * depth * sizeof(T), 0u, a.data(), b.data(), d.data(),
              transposed);
  int wrong = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      double want = 1 + n % 2 + m / 8 * 2;
      for (int k = 0; k < depth; ++k)
        want += double{load(a[transposed ? k * 16 + m : m * depth + k])} *
                load(b[transposed ? k * 8 + n : n * depth + k]);
      wrong += !(std::fabs(d[m * 8 + n] - want) < (sizeof(T) == 4 ? 2e-2 : 1e-4));
    }
  if (wrong) std::printf("mma of %zu bytes, transposed %d: %d wrong\n", sizeof(T), transposed, wrong);
  return wrong;
}

// What a copy leaves before it is waited for, and after: out [2, 8].
__global__ void copy_late(const float* from, float* out) {
  FRD_DYNAMIC_SHARED(float, shared);
  cp_async_16(shared, from, 16);
  cp_async_commit();
  cp_async_16(shared + 4, from + 4, 8);
  cp_async_commit();
  for (int pending = 1; pending >= 0; --pending) {
    pending ? cp_async_wait<1>() : cp_async_wait<0>();
    for (int i = 0; i < 8; ++i) out[(1 - pending) * 8 + i] = shared[i];
  }
}

int check_copies() {
  const float from[6] = {1, 2, 3, 4, 5, 6};
  alignas(16) float aligned_from[8];
  std::memcpy(aligned_from, from, sizeof(from));
  float out[16];
  emu::launch(copy_late, dim3(1), dim3(1), 32, 0u, aligned_from, out);
  int wrong = 0;
  for (int i = 0; i < 8; ++i) {
    wrong += i < 4 ? out[i] != from[i] : out[i] == out[i];  // the second group has not arrived: NaN
    wrong += out[8 + i] != (i < 6 ? from[i] : 0);
  }
  if (wrong) std::printf("copies: %d wrong\n", wrong);
  return wrong;
}

// d_point and d_bias against plain loops; `parts` of the sum, or 0 for the launcher's.
template <class T, bool kPixels, class Tile>
int check(int batch, int channels, int outs, int pixels, int parts) {
  const auto grad = numbers<T>(int64_t{1} * batch * outs * pixels),
             hidden = numbers<T>(int64_t{1} * batch * channels * pixels);
  auto d_point = nans<T>(int64_t{1} * outs * channels), d_bias = nans<T>(outs);
  PointGradArgs a{};
  a.channels_last = kPixels, a.batch = batch, a.pixels = pixels, a.channels = channels, a.out_channels = outs;
  a.parts = parts ? parts : point_grad_parts(batch, pixels);
  std::vector<float> partial(int64_t{1} * a.parts * outs * (channels + 1), NAN);
  a.grad = grad.data(), a.hidden = hidden.data(), a.partial = partial.data();
  a.d_point = d_point.data(), a.d_bias = d_bias.data();
  int wrong = launch_point_grad<T, kPixels, Tile>(a, nullptr) != cudaSuccess;
  const auto at = [&](const std::vector<T>& v, int b, int c, int p, int count) {
    return double{
        load(v[kPixels ? (int64_t{b} * pixels + p) * count + c : (int64_t{b} * count + c) * pixels + p])};
  };
  const double half_ulp = sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, f16> ? 0x1p-11 : 0x1p-8;
  const auto misses = [&](T found, double want, double size) {
    return !(std::fabs(load(found) - want) <= 1.001 * half_ulp * std::fabs(want) + 0x1p-21 * size);
  };
  for (int o = 0; o < outs; ++o) {
    double sum = 0, size = 0;
    for (int b = 0; b < batch; ++b)
      for (int p = 0; p < pixels; ++p)
        sum += at(grad, b, o, p, outs), size += std::fabs(at(grad, b, o, p, outs));
    wrong += misses(d_bias[o], sum, size);
    for (int c = 0; c < channels; ++c) {
      sum = 0, size = 0;
      for (int b = 0; b < batch; ++b)
        for (int p = 0; p < pixels; ++p) {
          const double h = at(hidden, b, c, p, channels), term = at(grad, b, o, p, outs) * (h > 0 ? h : 0);
          sum += term, size += std::fabs(term);
        }
      wrong += misses(d_point[int64_t{o} * channels + c], sum, size);
    }
  }
  if (wrong)
    std::printf("%zu bytes, tile of %d %s, [%d, %d, %d] x %d in %d parts: %d wrong\n", sizeof(T), Tile::kM,
                kPixels ? "pixels" : "planes", batch, channels, outs, pixels, a.parts, wrong);
  return wrong;
}

template <class T, bool kPixels>
int check_grads() {
  return check<T, kPixels, SmallGradTile>(2, 72, 40, 200, 0) +
         check<T, kPixels, SmallGradTile>(3, 17, 5, 33, 2) + check<T, kPixels, SmallGradTile>(1, 1, 1, 1, 0) +
         check<T, kPixels, LargeGradTile>(2, 136, 144, 88, 3) +
         check<T, kPixels, LargeGradTile>(1, 40, 130, 67, 1);
}

}  // namespace

int main() {
  int wrong = check_copies();
  for (const bool transposed : {false, true})
    wrong += check_mma<bf16>(transposed) + check_mma<f16>(transposed);
  wrong += check_mma<float>(false);
  wrong += check_grads<bf16, true>() + check_grads<f16, false>() + check_grads<float, true>() +
           check_grads<float, false>();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
