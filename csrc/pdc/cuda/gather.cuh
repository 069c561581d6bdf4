// The general kernels: every tap of every output is tested and loaded. Neighbouring threads have neighbouring
// elements.
#pragma once
#include "pdc/cuda/args.h"
#include "pdc/cuda/window.cuh"

namespace frd {

constexpr int kGatherThreads = 256;

// Index on an axis of what stands `at` steps after the first tap of the first window; -1 outside, and between
// the pixels of dy.
__device__ __forceinline__ int source_index(const PdcAxis& a, const Divisor& insert, int64_t at) {
  at -= a.lead;
  if (at < 0) return -1;
  if (a.insert != 1) {
    const int64_t index = at >> 31 == 0 ? insert.divide(static_cast<int>(at)) : at / a.insert;
    if (index * a.insert != at) return -1;
    at = index;
  }
  return at < a.source ? static_cast<int>(at) : -1;
}

// Elements from one column, row and channel to the next.
struct GatherStrides {
  int column, row, channel;
  __device__ __forceinline__ GatherStrides(const PdcGather& p, int64_t height, int64_t width)
      : column(p.pixels ? p.channels : 1),
        row(static_cast<int>(width) * column),
        channel(p.pixels ? 1 : static_cast<int>(height * width)) {}
};

// The window of output (y, x) in a channel of the source.
template <class T, class A, int side>
__device__ __forceinline__ void gather(A (&window)[side][side], const PdcGather& p,
                                       const GatherStrides& stride, const T* channel, int y, int x) {
  int column[side];
#pragma unroll
  for (int j = 0; j < side; ++j) {
    column[j] = source_index(p.x, p.insert_x, x * p.x.step + j * p.x.dilation);
  }
#pragma unroll
  for (int i = 0; i < side; ++i) {
    const int row = source_index(p.y, p.insert_y, y * p.y.step + i * p.y.dilation);
#pragma unroll
    for (int j = 0; j < side; ++j) {
      const bool inside = row >= 0 && column[j] >= 0;
      window[i][j] = inside ? load(channel[row * stride.row + column[j] * stride.column]) : A(0);
    }
  }
}

template <class A>
__device__ __forceinline__ void turn(PdcKind from, A (&w)[kPdcWeights], A theta) {
  if (from == PdcKind::central) pdc_turn<PdcKind::central>(w, theta);
  if (from == PdcKind::angular) pdc_turn<PdcKind::angular>(w, theta);
  if (from == PdcKind::radial) pdc_turn<PdcKind::radial>(w, theta);
  if (from == PdcKind::vanilla) pdc_turn<PdcKind::vanilla>(w, theta);
}

template <class T, PdcKind kind>
__global__ void __launch_bounds__(kGatherThreads) pdc_gather_stencil(PdcGather p) {
  using A = compute_t<T>;
  constexpr int side = kernel_side(kind);
  const int image = p.chunks.divide(blockIdx.x);
  const int i = (blockIdx.x - image * p.chunks.value) * kGatherThreads + threadIdx.x;
  if (i >= p.outputs) return;
  const A theta = static_cast<A>(p.theta);
  const GatherStrides from(p, p.y.source, p.x.source);
  const int outer = p.inner.divide(i), inner = i - outer * static_cast<int>(p.inner.value);
  const int last = p.middle.divide(outer), middle = outer - last * static_cast<int>(p.middle.value);
  const int c = p.pixels ? inner : last, x = p.pixels ? middle : inner, y = p.pixels ? last : middle;

  A window[side][side], w[kPdcWeights];
  const T* source = static_cast<const T*>(p.source) + image * (p.y.source * p.x.source * p.channels);
  gather(window, p, from, source + static_cast<int64_t>(c) * from.channel, y, x);
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k) w[k] = load(static_cast<const T*>(p.weight)[c * kPdcWeights + k]);
  if (p.turned) turn(p.turned_from, w, theta);
  const A bias = p.bias ? static_cast<A>(load(static_cast<const T*>(p.bias)[c])) : A(0);
  const A sum = p.pure ? pdc_combine<kind, true>(bias, window, 0, 0, w, theta)
                       : pdc_combine<kind, false>(bias, window, 0, 0, w, theta);
  store((static_cast<T*>(p.out) + static_cast<int64_t>(image) * p.outputs)[i], sum);
}

constexpr int kGatherChunk = 16;  // pixels of a unit for each thread

// dw and db. channels_last: a warp's lanes have 32 channels; NCHW: all threads of a block have the same one.
template <class T, PdcKind kind>
__global__ void __launch_bounds__(kGatherThreads, 2) pdc_gather_sums(PdcGather p) {
  using A = compute_t<T>;
  constexpr int side = kernel_side(kind);
  __shared__ A shared[kGatherThreads];
  const A theta = static_cast<A>(p.theta);
  const GatherStrides from(p, p.y.source, p.x.source), to(p, p.y.out, p.x.out);
  const int lanes = p.pixels ? 32 : 1, threads = kGatherThreads / lanes, thread = threadIdx.x / lanes;
  const int groups = (p.channels + lanes - 1) / lanes;
  const int part = blockIdx.x / groups, c = (blockIdx.x - part * groups) * lanes + threadIdx.x % lanes;
  A sums[kPdcSums] = {};
  for (int unit = part; unit < p.units && c < p.channels; unit += p.parts) {
    const int image = p.chunks.divide(unit);
    const int first = (unit - image * static_cast<int>(p.chunks.value)) * kGatherChunk * threads;
    const T* source = static_cast<const T*>(p.source) + image * (p.y.source * p.x.source * p.channels) +
                      static_cast<int64_t>(c) * from.channel;
    const T* grad = static_cast<const T*>(p.grad) + image * (p.y.out * p.x.out * p.channels) +
                    static_cast<int64_t>(c) * to.channel;
    for (int i = 0; i < kGatherChunk; ++i) {
      const int q = first + i * threads + thread;
      if (q >= p.outputs) break;
      const int y = p.inner.divide(q), x = q - y * static_cast<int>(p.inner.value);
      A window[side][side];
      gather(window, p, from, source, y, x);
      const A g = load(grad[y * to.row + x * to.column]);
      if (p.pure) {
        pdc_correlate<kind, true>(sums, window, 0, 0, g, theta);
      } else {
        pdc_correlate<kind, false>(sums, window, 0, 0, g, theta);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
    __syncthreads();
    shared[threadIdx.x] = sums[k];
    __syncthreads();
    for (int half = threads / 2; half > 0; half /= 2) {
      if (thread < half) shared[threadIdx.x] += shared[threadIdx.x + half * lanes];
      __syncthreads();
    }
    if (thread == 0 && c < p.channels)
      static_cast<A*>(p.sums)[(static_cast<int64_t>(part) * kPdcSums + k) * p.channels + c] =
          shared[threadIdx.x];
  }
}

constexpr int kAddLanes = 32, kAddRows = 16;

// sums [parts, 10, C] -> dw [C, 9], db [C]: a row of threads adds every kAddRows-th part, then the rows are
// added.
template <class T>
__global__ void __launch_bounds__(kAddLanes* kAddRows)
    pdc_add_parts(const compute_t<T>* __restrict__ sums, int parts, int channels, T* __restrict__ dw,
                  T* __restrict__ db) {
  using A = compute_t<T>;
  __shared__ A shared[kAddRows][kAddLanes];
  const int lane = threadIdx.x % kAddLanes, row = threadIdx.x / kAddLanes;
  const int k = blockIdx.x % kPdcSums, c = blockIdx.x / kPdcSums * kAddLanes + lane;
  A sum = 0;
  if (c < channels) {
    const int64_t pitch = static_cast<int64_t>(kPdcSums) * channels;
    const A* from = sums + static_cast<int64_t>(k) * channels + c;
#pragma unroll 4
    for (int part = row; part < parts; part += kAddRows) sum += from[part * pitch];
  }
  shared[row][lane] = sum;
  __syncthreads();
  if (row != 0 || c >= channels) return;
  for (int r = 1; r < kAddRows; ++r) sum += shared[r][lane];
  store(k < kPdcWeights ? dw[static_cast<int64_t>(c) * kPdcWeights + k] : db[c], sum);
}

}  // namespace frd
