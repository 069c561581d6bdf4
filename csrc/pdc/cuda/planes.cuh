// NCHW: a thread owns kRows rows of a 16-byte vector of columns, or of a single column where rows are not
// aligned. It reads them straight from device memory: the first cache serves the rows and neighbours that
// threads share, and a copy to shared memory would cost more instructions than the two scalar loads at the
// ends of a vector.
#pragma once
#include "pdc/cuda/args.h"
#include "pdc/cuda/window.cuh"
#include "pdc/cuda/words.cuh"

namespace frd {

constexpr int kPlaneThreads = 128;

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void load_columns(float (&v)[kPerVector<T>], const T* from, bool inside) {
  const uint4 vector = load_words_if(inside, from);
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[kPerWord<T>];
    unpack(words[i], pair, T{});
#pragma unroll
    for (int j = 0; j < kPerWord<T>; ++j) v[i * kPerWord<T> + j] = pair[j];
  }
}
template <class T>
__device__ __forceinline__ void load_columns(float (&v)[1], const T* from, bool inside) {
  v[0] = load_element_if(inside, from);
}

template <class T>
__device__ __forceinline__ void store_columns(bool inside, T* to, const float (&v)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[kPerWord<T>];
#pragma unroll
    for (int j = 0; j < kPerWord<T>; ++j) pair[j] = v[i * kPerWord<T> + j];
    words[i] = pack(pair, T{});
  }
  store_words_if(inside, to, uint4{words[0], words[1], words[2], words[3]});
}
template <class T>
__device__ __forceinline__ void store_columns(bool inside, T* to, const float (&v)[1]) {
  store_element_if(inside, to, v[0]);
}

// Of a plane [height, width]: rows y, y + dy, ..., kColumns columns from x on and `reach` more on both sides,
// dx apart where kColumns is 1; zeros outside. The kColumns are all inside or all outside.
template <int reach, int kColumns, class T, int rows>
__device__ __forceinline__ void load_window(float (&window)[rows][kColumns + 2 * reach], const T* plane,
                                            int height, int width, int y, int x, int dy, int dx) {
  const auto column_inside = [&](int c) { return static_cast<unsigned>(c) < static_cast<unsigned>(width); };
  const T* row = plane + (static_cast<int64_t>(y) * width + x);
#pragma unroll
  for (int r = 0; r < rows; ++r, y += dy, row += static_cast<int64_t>(dy) * width) {
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(height);
    float v[kColumns];
    load_columns(v, row, inside & column_inside(x));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) window[r][reach + j] = v[j];
#pragma unroll
    for (int j = 1; j <= reach; ++j) {
      const int left = -j * dx, right = kColumns - 1 + j * dx;
      window[r][reach - j] = load_element_if(inside & column_inside(x + left), row + left);
      window[r][reach + kColumns - 1 + j] = load_element_if(inside & column_inside(x + right), row + right);
    }
  }
}

// w: [C, 9]
template <class T>
__device__ __forceinline__ void load_weights(float (&w)[kPdcWeights], const PdcTiles& p, int channel) {
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k)
    w[k] = load(static_cast<const T*>(p.weight)[channel * kPdcWeights + k]);
}

// Stencil of a window whose outputs are rows y, y + dy, ... of plane [height, width] from column x on.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns, int rows, int columns>
__device__ __forceinline__ void stencil_rows(const float (&window)[rows][columns],
                                             const float (&w)[kPdcWeights], float bias, float theta, T* plane,
                                             int height, int width, int y, int x, int dy) {
  T* to = plane + (static_cast<int64_t>(y) * width + x);
  const bool inside = static_cast<unsigned>(x) < static_cast<unsigned>(width);
#pragma unroll
  for (int r = 0; r < kRows; ++r, y += dy, to += static_cast<int64_t>(dy) * width) {
    float sums[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] = pdc_combine<kind, pure>(bias, window, r, j, w, theta);
    store_columns(inside & (static_cast<unsigned>(y) < static_cast<unsigned>(height)), to, sums);
  }
}

template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(kPlaneThreads) pdc_planes_forward(PdcTiles p) {
  constexpr int reach = pdc_reach(kind);
  const int unit = blockIdx.x * kPlaneThreads + threadIdx.x;
  if (unit >= p.units) return;
  const PdcTile tile = tile_of(p, unit);
  const int channel = tile.image - p.groups.divide(tile.image) * static_cast<int>(p.groups.value);
  const int y = p.y.first(tile.row, kRows), x = tile.column * kColumns;
  const T* plane =
      static_cast<const T*>(p.source) + static_cast<int64_t>(tile.image) * (p.y.x_size * p.x.x_size);
  T* out = static_cast<T*>(p.out) + static_cast<int64_t>(tile.image) * (p.y.q_size * p.x.q_size);
  float window[kRows + 2 * reach][kColumns + 2 * reach], w[kPdcWeights];
  load_window<reach, kColumns>(window, plane, p.y.x_size, p.x.x_size, y + p.y.x_first - reach * p.y.dilation,
                               x + p.x.x_first, p.y.dilation, p.x.dilation);
  load_weights<T>(w, p, channel);
  const float bias = p.bias ? load(static_cast<const T*>(p.bias)[channel]) : 0.f;
  stencil_rows<T, kind, pure, kRows, kColumns>(window, w, bias, p.theta, out, p.y.q_size, p.x.q_size,
                                               y + p.y.q_first, x + p.x.q_first, p.y.dilation);
}

// A warp has a channel and a part of the units of all images; so the sums stay in registers until the end.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(kPlaneThreads) pdc_planes_backward(PdcTiles p) {
  constexpr int reach = pdc_reach(kind);
  const int lane = threadIdx.x % 32, warp = blockIdx.x * (kPlaneThreads / 32) + threadIdx.x / 32;
  const int part = p.groups.divide(warp), channel = warp - part * static_cast<int>(p.groups.value);
  if (part >= p.parts) return;
  float w[kPdcWeights], sums[kPdcSums] = {};
  load_weights<T>(w, p, channel);
  pdc_turn<kind>(w, p.theta);
  for (int unit = part * 32 + lane; unit < p.units; unit += p.parts * 32) {
    const PdcTile tile = tile_of(p, unit);
    const int first = p.y.first(tile.row, kRows), column = tile.column * kColumns;
    const int y = first + p.y.x_first, x = column + p.x.x_first, qy = first + p.y.q_first,
              qx = column + p.x.q_first;
    const int64_t plane = static_cast<int64_t>(tile.image) * p.groups.value + channel;
    float g[kRows + 2 * reach][kColumns + 2 * reach];
    load_window<reach, kColumns>(g, static_cast<const T*>(p.grad) + plane * (p.y.q_size * p.x.q_size),
                                 p.y.q_size, p.x.q_size, qy - reach * p.y.dilation, qx, p.y.dilation,
                                 p.x.dilation);
    if (p.out) {
      stencil_rows<T, turned_kind(kind), pure, kRows, kColumns>(
          g, w, 0.f, p.theta, static_cast<T*>(p.out) + plane * (p.y.x_size * p.x.x_size), p.y.x_size,
          p.x.x_size, y, x, p.y.dilation);
    }
    if (p.sums) {
      float window[kRows + 2 * reach][kColumns + 2 * reach];
      load_window<reach, kColumns>(
          window, static_cast<const T*>(p.source) + plane * (p.y.x_size * p.x.x_size), p.y.x_size, p.x.x_size,
          y - reach * p.y.dilation, x, p.y.dilation, p.x.dilation);
      const bool inside = static_cast<unsigned>(qx) < static_cast<unsigned>(p.x.q_size);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool valid =
            inside & (static_cast<unsigned>(qy + r * p.y.dilation) < static_cast<unsigned>(p.y.q_size));
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          pdc_correlate_if<kind, pure>(valid, sums, window, r, j, g[r + reach][j + reach], p.theta);
      }
    }
  }
  if (!p.sums) return;
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
    float sum = sums[k];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) p.sums[(static_cast<int64_t>(part) * kPdcSums + k) * p.groups.value + channel] = sum;
  }
}

}  // namespace frd
