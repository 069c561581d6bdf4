// Rows of tokens in memory of any strides, and tiles of them, for the kBlockThreads threads of a block.
// Tiles are rows [m, pitch] of the compute type, in shared or global memory.
#pragma once
#include "cluster/common.h"
#include "cluster/cuda/block.h"
#include "core/mma.h"

namespace frd {

FRD_DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x) / 32; }
FRD_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

struct Range {
  int begin, end;
  __device__ int size() const { return end - begin; }
};
// Part `rank` of `parts` contiguous ones of 0 .. count; the last ones may be empty.
FRD_DEVICE Range range_of(int count, int parts, int rank) {
  const int step = (count + parts - 1) / parts, begin = rank * step < count ? rank * step : count;
  return {begin, begin + step < count ? begin + step : count};
}

// Rows [n, channels] of one item in memory of any strides (in elements).
template <class T>
struct Rows {
  T* data;
  int64_t row, channel;
  __device__ T& at(int64_t n, int c) const { return data[n * row + c * channel]; }
};
template <class T>
FRD_DEVICE Rows<T> rows_of(const TokenView& view, int64_t item) {
  return {static_cast<T*>(view.data) + item * view.batch, view.token, view.channel};
}

template <class T>
struct alignas(16) Pack16 {
  T v[16 / sizeof(T)];
};
FRD_DEVICE bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of `channels` can be accessed in whole Pack16.
template <class T>
FRD_DEVICE bool is_wide(const Rows<T>& rows, int channels) {
  constexpr int kWidth = 16 / sizeof(T);
  return rows.channel == 1 && channels % kWidth == 0 && rows.row % kWidth == 0 && aligned_16(rows.data);
}

// Calls f(row, channel) for all of [m, channels], neighbouring lanes with neighbouring tokens where these are
// neighbours in memory, else with neighbouring channels.
template <class F>
FRD_DEVICE void for_tile(int m, int channels, bool channel_major, const F& f) {
  if (channel_major) {
    for (int c = warp_of_block(); c < channels; c += kBlockWarps)
      for (int i = lane_of_warp(); i < m; i += 32) f(i, c);
  } else {
    for (int i = warp_of_block(); i < m; i += kBlockWarps)
      for (int c = lane_of_warp(); c < channels; c += 32) f(i, c);
  }
}

// to [m, pitch] = the rows first .. first + m. No barrier.
template <class T>
FRD_DEVICE void load_tile(const Rows<T>& from, int64_t first, int m, int channels, compute_t<T>* to,
                          int pitch) {
  constexpr int kWidth = 16 / sizeof(T);
  if (is_wide(from, channels)) {
    for (int i = warp_of_block(); i < m; i += kBlockWarps)
      for (int c = lane_of_warp() * kWidth; c < channels; c += 32 * kWidth) {
        const Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(&from.at(first + i, c));
#pragma unroll
        for (int e = 0; e < kWidth; ++e) to[i * pitch + c + e] = load(pack.v[e]);
      }
    return;
  }
  for_tile(m, channels, from.channel != 1,
           [&](int i, int c) { to[i * pitch + c] = load(from.at(first + i, c)); });
}

// Sum over the lanes of a warp, in every lane; its order does not depend on the values.
template <class A>
FRD_DEVICE A warp_sum(A v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

template <class A>
FRD_DEVICE void fill_block(A* p, int64_t n, A v) {
  for (int64_t i = threadIdx.x; i < n; i += kBlockThreads) p[i] = v;
}

}  // namespace frd
