// The gradient of the 1x1 weight and its bias, d_point = sum over pixels of grad^T relu(hidden), d_bias = sum
// of grad, and its launcher. The sum is cut into parts that depend on the shapes alone; a second kernel adds
// them in order.
#pragma once
#include "core/cuda_device.h"
#include "pdc_block/cuda/load.cuh"
#include "pdc_block/cuda/product.cuh"
#include "pdc_block/cuda/to_be_deleted/point_grad.h"

namespace frd {

// A thread block computes kM output channels by kN channels; kStages runs of pixels are in flight.
struct LargeGradTile {
  static constexpr int kM = 128;
  static constexpr int kN = 128;
  static constexpr int kWarps = 8;
  static constexpr int kWarpM = 32;
  static constexpr int kWarpN = 64;
  static constexpr int kStages = 2;
  static constexpr int kBlocks = 2;
};
struct SmallGradTile {
  static constexpr int kM = 64;
  static constexpr int kN = 64;
  static constexpr int kWarps = 4;
  static constexpr int kWarpM = 32;
  static constexpr int kWarpN = 32;
  static constexpr int kStages = 3;
  static constexpr int kBlocks = 3;
};

// Arguments of the kernel.
struct PointGrad : PointGradArgs {
  // Contiguous pixels: of all images, in NCHW of one image.
  int64_t plane;
  // Elements of grad and of hidden over those pixels.
  int64_t image_grad, image_hidden;
  Divider runs_of_image;
  int runs;
  bool vectorized_grad, vectorized_hidden, vectorized_partial;
};

template <class T, bool kChannelsLast, class Tile>
struct PointGradShape {
  static constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  // Pixels of a run, which one step multiplies.
  static constexpr int kRun = 32 * kUnit;
  static constexpr int kThreads = Tile::kWarps * 32;
  static constexpr int kStageWords = 32 * (Tile::kM + Tile::kN);
  static constexpr int kSharedBytes = 4 * Tile::kStages * kStageWords;
};

// channels_last: copies kRun pixels of kCount channels from c0 on to [kRun, kCount], swizzled; zeros beyond
// `left` pixels and beyond the last channel.
template <class T, int kThreads, int kCount>
FRD_DEVICE void load_run_across_k(const T* pixels, int64_t left, int c0, int channels, bool vectorized,
                                  uint32_t* to) {
  constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  constexpr int kRow = kCount / kUnit;
  constexpr int kRun = 32 * kUnit;
  const int groups = kRow / (vectorized ? 4 : 1);
  const int width = kUnit * (vectorized ? 4 : 1);
  for (int i = threadIdx.x; i < kRun * groups; i += kThreads) {
    const int pixel = i / groups;
    const int group = i % groups;
    const int c = c0 + group * width;
    const T* from = pixels + static_cast<int64_t>(pixel) * channels;
    const bool inside = pixel < left;
    const int swizzle = sizeof(T) == 2 ? pixel & 7 : 0;
    if (vectorized) {
      const bool in_range = inside && c < channels;
      cp_async_16(to + pixel * kRow + (group ^ swizzle) * 4, in_range ? from + c : pixels, in_range ? 16 : 0);
    } else {
      to[pixel * kRow + ((group >> 2) ^ swizzle) * 4 + (group & 3)] =
          load_word_if(from, c, inside && c < channels, c + 1, inside && c + 1 < channels);
    }
  }
}

// NCHW: copies kCount channels of kRun pixels each to [kCount, 32 words], swizzled.
template <class T, int kThreads, int kCount>
FRD_DEVICE void load_run_along_k(const T* planes, int64_t plane, int64_t left, int c0, int channels,
                                 bool vectorized, uint32_t* to) {
  constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  const int shift = vectorized ? 3 : 5;
  const int width = kUnit * (vectorized ? 4 : 1);
  for (int i = threadIdx.x; i < kCount << shift; i += kThreads) {
    const int row = i >> shift;
    const int group = i & ((1 << shift) - 1);
    const int pixel = group * width;
    const bool in_range = c0 + row < channels;
    const T* from = planes + (in_range ? (c0 + row) * plane : 0);
    if (vectorized)
      cp_async_16(to + row * 32 + swizzled<T>(row, group) * 4,
                  in_range && pixel < left ? from + pixel : planes, in_range && pixel < left ? 16 : 0);
    else
      to[row * 32 + swizzled<T>(row, group >> 2) * 4 + (group & 3)] =
          load_word_if(from, pixel, in_range && pixel < left, pixel + 1, in_range && pixel + 1 < left);
  }
}

template <class T, bool kChannelsLast, class Tile>
FRD_DEVICE void load_run(const PointGrad& a, int run, int first_out, int first_channel, uint32_t* stage) {
  using S = PointGradShape<T, kChannelsLast, Tile>;
  const int image = a.runs_of_image.quotient(run);
  const int64_t first = static_cast<int64_t>(run - image * a.runs_of_image.divisor) * S::kRun;
  const int64_t left = a.plane - first;
  const T* grad = static_cast<const T*>(a.grad) + image * a.image_grad;
  const T* hidden = static_cast<const T*>(a.hidden) + image * a.image_hidden;
  uint32_t* columns = stage + 32 * Tile::kM;
  if constexpr (kChannelsLast) {
    load_run_across_k<T, S::kThreads, Tile::kM>(grad + first * a.out_channels, left, first_out,
                                                a.out_channels, a.vectorized_grad, stage);
    load_run_across_k<T, S::kThreads, Tile::kN>(hidden + first * a.channels, left, first_channel, a.channels,
                                                a.vectorized_hidden, columns);
  } else {
    load_run_along_k<T, S::kThreads, Tile::kM>(grad + first, a.plane, left, first_out, a.out_channels,
                                               a.vectorized_grad, stage);
    load_run_along_k<T, S::kThreads, Tile::kN>(hidden + first, a.plane, left, first_channel, a.channels,
                                               a.vectorized_hidden, columns);
  }
}

// Epilogue that stores the sums of a tile to a part [Co, C].
struct PartialSums {
  const PointGrad& a;
  float* partial;
  int first_out, first_channel;
  struct Nothing {};
  __device__ __forceinline__ Nothing prefetch(int, int) const { return {}; }
  template <int kVector>
  __device__ __forceinline__ void store(int row, int column, const float (&v)[kVector], Nothing) const {
    const int out = first_out + row;
    const int c = first_channel + column;
    if (out >= a.out_channels) return;
    float* to = partial + static_cast<int64_t>(out) * a.channels + c;
    if (a.vectorized_partial && c < a.channels) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4)
        *reinterpret_cast<float4*>(to + i) = {v[i], v[i + 1], v[i + 2], v[i + 3]};
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (c + i < a.channels) to[i] = v[i];
    }
  }
};

// partial[co, c] = sum of grad[co] relu(hidden[c]) over the runs of part blockIdx.x, for the tile
// (blockIdx.y, blockIdx.z) of [Co, C].
template <class T, bool kChannelsLast, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, sizeof(T) == 4 ? 1 : Tile::kBlocks)
    point_grad_kernel(const PointGrad a) {
  using S = PointGradShape<T, kChannelsLast, Tile>;
  constexpr int kStages = Tile::kStages;
  constexpr Operands kOperands = kChannelsLast ? Operands::across_k : Operands::along_k;
  // uint4 aligns the shared memory for vectors.
  FRD_DYNAMIC_SHARED(uint4, shared_groups);
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_groups);
  const int first_out = static_cast<int>(blockIdx.y) * Tile::kM;
  const int first_channel = static_cast<int>(blockIdx.z) * Tile::kN;
  const int64_t runs = a.runs;
  const int begin = static_cast<int>(runs * blockIdx.x / a.parts);
  const int end = static_cast<int>(runs * (blockIdx.x + 1) / a.parts);
  TileProduct<T, Tile::kM, Tile::kN, Tile::kWarpM, Tile::kWarpN, true> product;
  product.clear();
#pragma unroll 1
  for (int run = begin - (kStages - 1); run < end; ++run) {
    if (run >= begin) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
    }
    const int next = run + kStages - 1;
    if (next < end)
      load_run<T, kChannelsLast, Tile>(a, next, first_out, first_channel,
                                       shared + (next - begin) % kStages * S::kStageWords);
    cp_async_commit();
    if (run < begin) continue;
    const uint32_t* stage = shared + (run - begin) % kStages * S::kStageWords;
    product.template add<kOperands, true>(stage, stage + 32 * Tile::kM);
  }
  const int64_t weights = static_cast<int64_t>(a.out_channels) * a.channels;
  float* partial = a.partial + blockIdx.x * (weights + a.out_channels);
  product.finish(PartialSums{a, partial, first_out, first_channel});
  if (first_channel == 0)
    product.finish_row_sums([&](int row, float sum) {
      if (first_out + row < a.out_channels) partial[weights + first_out + row] = sum;
    });
}

constexpr int kReduceThreads = 256;

// partial [parts, Co * C + Co] -> d_point [Co, C], d_bias [Co]: sums of the parts, in ascending order.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) point_grad_reduce_kernel(const PointGradArgs a) {
  const int64_t weights = static_cast<int64_t>(a.out_channels) * a.channels;
  const int64_t row = weights + a.out_channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i >= row) return;
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < a.parts; ++part) sum += a.partial[part * row + i];
  store(i < weights ? static_cast<T*>(a.d_point)[i] : static_cast<T*>(a.d_bias)[i - weights], sum);
}

template <class T, bool kChannelsLast, class Tile>
cudaError_t launch_point_grad(const PointGradArgs& args, cudaStream_t stream) {
  using S = PointGradShape<T, kChannelsLast, Tile>;
  PointGrad a{};
  static_cast<PointGradArgs&>(a) = args;
  const int64_t images = kChannelsLast ? 1 : args.batch;
  a.plane = kChannelsLast ? args.batch * args.pixels : args.pixels;
  a.image_grad = a.plane * a.out_channels;
  a.image_hidden = a.plane * a.channels;
  a.runs_of_image = Divider(block_count(a.plane, S::kRun));
  a.runs = static_cast<int>(images * a.runs_of_image.divisor);
  constexpr int64_t kSize = sizeof(T);
  a.vectorized_grad = aligned(a.grad, 16) && (kChannelsLast ? a.out_channels : a.plane) * kSize % 16 == 0;
  a.vectorized_hidden = aligned(a.hidden, 16) && (kChannelsLast ? a.channels : a.plane) * kSize % 16 == 0;
  a.vectorized_partial = a.channels % 8 == 0 && a.out_channels % 4 == 0 && aligned(a.partial, 16);
  const auto kernel = point_grad_kernel<T, kChannelsLast, Tile>;
  if (const cudaError_t error = allow_shared_memory(kernel, S::kSharedBytes)) return error;
  const dim3 grid(a.parts, block_count(a.out_channels, Tile::kM), block_count(a.channels, Tile::kN));
  FRD_LAUNCH(kernel, grid, dim3(S::kThreads), S::kSharedBytes, stream, a);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const int64_t sums = int64_t{args.out_channels} * (args.channels + 1);
  FRD_LAUNCH((point_grad_reduce_kernel<T>), dim3(block_count(sums, kReduceThreads)), dim3(kReduceThreads), 0,
             stream, args);
  return cudaGetLastError();
}

// Small tiles if large ones would leave the GPU idle; the results are the same.
template <class T>
cudaError_t point_grad(const PointGradArgs& a, cudaStream_t stream) {
  const int64_t large_blocks = int64_t{a.parts} * block_count(a.out_channels, LargeGradTile::kM) *
                               block_count(a.channels, LargeGradTile::kN);
  const bool large = large_blocks >= 128;
  if (a.channels_last)
    return large ? launch_point_grad<T, true, LargeGradTile>(a, stream)
                 : launch_point_grad<T, true, SmallGradTile>(a, stream);
  return large ? launch_point_grad<T, false, LargeGradTile>(a, stream)
               : launch_point_grad<T, false, SmallGradTile>(a, stream);
}

}  // namespace frd
