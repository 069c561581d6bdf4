// The gradient of the 1x1 weight and of its bias: sums over all pixels of all images, in parts that depend on
// the shapes alone, which a second kernel adds in their order.
#pragma once
#include "pdc_block/cuda/load.cuh"
#include "pdc_block/cuda/product.cuh"

namespace frd {

// kM output channels by kN channels of a block of threads; kStages runs of pixels are in flight.
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

struct PointGrad : PointGradArgs {
  int64_t plane;                     // pixels that lie in one piece: of all images, in NCHW of one
  int64_t image_grad, image_hidden;  // elements of such a piece
  Divider runs_of_image;
  int runs;
  bool wide_grad, wide_hidden, wide_partial;
};

template <class T, bool kPixels, class Tile>
struct PointGradShape {
  static constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  static constexpr int kRun = 32 * kUnit;  // pixels that a step multiplies
  static constexpr int kThreads = Tile::kWarps * 32;
  static constexpr int kStageWords = 32 * (Tile::kM + Tile::kN);
  static constexpr int kSharedBytes = 4 * Tile::kStages * kStageWords;
};

// channels_last: kRun pixels of kCount channels from c0 on -> [kRun, kCount]; zeros beyond `left` pixels and
// the channels there are.
template <class T, int kThreads, int kCount>
FRD_DEVICE void load_run_across(const T* pixels, int64_t left, int c0, int channels, bool wide,
                                uint32_t* to) {
  constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  constexpr int kRow = kCount / kUnit;
  constexpr int kRun = 32 * kUnit;
  const int groups = kRow / (wide ? 4 : 1);
  const int width = kUnit * (wide ? 4 : 1);
  for (int i = threadIdx.x; i < kRun * groups; i += kThreads) {
    const int pixel = i / groups;
    const int group = i % groups;
    const int c = c0 + group * width;
    const T* from = pixels + static_cast<int64_t>(pixel) * channels;
    const bool inside = pixel < left;
    const int flip = sizeof(T) == 2 ? pixel & 7 : 0;
    if (wide) {
      const bool there = inside && c < channels;
      cp_async_16(to + pixel * kRow + (group ^ flip) * 4, there ? from + c : pixels, there ? 16 : 0);
    } else {
      to[pixel * kRow + ((group >> 2) ^ flip) * 4 + (group & 3)] =
          gathered_word(from, c, inside && c < channels, c + 1, inside && c + 1 < channels);
    }
  }
}

// NCHW: of kCount channels kRun pixels each -> [kCount, 32 words], permuted.
template <class T, int kThreads, int kCount>
FRD_DEVICE void load_run_along(const T* planes, int64_t plane, int64_t left, int c0, int channels, bool wide,
                               uint32_t* to) {
  constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  const int shift = wide ? 3 : 5;
  const int width = kUnit * (wide ? 4 : 1);
  for (int i = threadIdx.x; i < kCount << shift; i += kThreads) {
    const int row = i >> shift;
    const int group = i & ((1 << shift) - 1);
    const int pixel = group * width;
    const bool there = c0 + row < channels;
    const T* from = planes + (there ? (c0 + row) * plane : 0);
    if (wide)
      cp_async_16(to + row * 32 + permuted<T>(row, group) * 4, there && pixel < left ? from + pixel : planes,
                  there && pixel < left ? 16 : 0);
    else
      to[row * 32 + permuted<T>(row, group >> 2) * 4 + (group & 3)] =
          gathered_word(from, pixel, there && pixel < left, pixel + 1, there && pixel + 1 < left);
  }
}

template <class T, bool kPixels, class Tile>
FRD_DEVICE void load_run(const PointGrad& a, int run, int first_out, int first_channel, uint32_t* stage) {
  using S = PointGradShape<T, kPixels, Tile>;
  const int image = a.runs_of_image.quotient(run);
  const int64_t first = static_cast<int64_t>(run - image * a.runs_of_image.divisor) * S::kRun;
  const int64_t left = a.plane - first;
  const T* grad = static_cast<const T*>(a.grad) + image * a.image_grad;
  const T* hidden = static_cast<const T*>(a.hidden) + image * a.image_hidden;
  uint32_t* columns = stage + 32 * Tile::kM;
  if constexpr (kPixels) {
    load_run_across<T, S::kThreads, Tile::kM>(grad + first * a.out_channels, left, first_out, a.out_channels,
                                              a.wide_grad, stage);
    load_run_across<T, S::kThreads, Tile::kN>(hidden + first * a.channels, left, first_channel, a.channels,
                                              a.wide_hidden, columns);
  } else {
    load_run_along<T, S::kThreads, Tile::kM>(grad + first, a.plane, left, first_out, a.out_channels,
                                             a.wide_grad, stage);
    load_run_along<T, S::kThreads, Tile::kN>(hidden + first, a.plane, left, first_channel, a.channels,
                                             a.wide_hidden, columns);
  }
}

// Takes the sums of a tile into a part [Co, C].
struct PartialSums {
  const PointGrad& a;
  float* partial;
  int first_out, first_channel;
  struct Nothing {};
  __device__ __forceinline__ Nothing fetch(int, int) const { return {}; }
  template <int kVector>
  __device__ __forceinline__ void give(int row, int column, const float (&v)[kVector], Nothing) const {
    const int out = first_out + row;
    const int c = first_channel + column;
    if (out >= a.out_channels) return;
    float* to = partial + static_cast<int64_t>(out) * a.channels + c;
    if (a.wide_partial && c < a.channels) {
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

// Part blockIdx.x of the sums of tile (blockIdx.y, blockIdx.z).
template <class T, bool kPixels, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, sizeof(T) == 4 ? 1 : Tile::kBlocks)
    point_grad_kernel(const PointGrad a) {
  using S = PointGradShape<T, kPixels, Tile>;
  constexpr int kStages = Tile::kStages;
  constexpr Operands kOperands = kPixels ? Operands::across_k : Operands::along_k;
  FRD_DYNAMIC_SHARED(uint4, shared_groups);  // aligned for vectors
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
      load_run<T, kPixels, Tile>(a, next, first_out, first_channel,
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

// partial [parts, Co * C + Co] -> d_point [Co, C], d_bias [Co], part after part
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

}  // namespace frd
