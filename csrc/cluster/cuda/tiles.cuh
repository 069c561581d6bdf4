// Steps on tiles of tokens that the clustering's kernels share, for the kTeamThreads threads of a block.
// Tiles are rows [m, pitch] of the compute type, in shared or global memory.
#pragma once
#include "cluster/cuda/args.h"
#include "core/mma.h"
#include "core/team.cuh"

namespace frd {

// Hides from the compiler where a value comes from. It would keep what it derives from it, such as addresses,
// in registers from one step of a kernel to the next, and spill others for it.
FRD_DEVICE void forget(int& v) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(v));
#endif
}
template <class V>
FRD_DEVICE void forget(V*& v) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(v));
#endif
}

// Whether a kernel of such teams is ever launched in this code: those of eight blocks in code for sm_90 and
// later, those of one in the other (team.h). One that is not is not worth its compilation.
template <int kBlocks>
FRD_DEVICE constexpr bool is_launched() {
#if defined(__CUDA_ARCH__)
  return (kBlocks > 1) == (__CUDA_ARCH__ >= 900);
#else
  return true;
#endif
}

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
    for (int c = warp_of_block(); c < channels; c += kTeamWarps)
      for (int i = lane_of_warp(); i < m; i += 32) f(i, c);
  } else {
    for (int i = warp_of_block(); i < m; i += kTeamWarps)
      for (int c = lane_of_warp(); c < channels; c += 32) f(i, c);
  }
}

// to [m, pitch] = the rows first .. first + m. No barrier.
template <class T>
FRD_DEVICE void load_tile(const Rows<T>& from, int64_t first, int m, int channels, compute_t<T>* to,
                          int pitch) {
  constexpr int kWidth = 16 / sizeof(T);
  if (is_wide(from, channels)) {
    for (int i = warp_of_block(); i < m; i += kTeamWarps)
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

// The reverse. No barrier.
template <class T>
FRD_DEVICE void store_tile(const compute_t<T>* from, int pitch, int64_t first, int m, int channels,
                           const Rows<T>& to) {
  constexpr int kWidth = 16 / sizeof(T);
  if (is_wide(to, channels)) {
    for (int i = warp_of_block(); i < m; i += kTeamWarps)
      for (int c = lane_of_warp() * kWidth; c < channels; c += 32 * kWidth) {
        Pack16<T> pack;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) store(pack.v[e], from[i * pitch + c + e]);
        *reinterpret_cast<Pack16<T>*>(&to.at(first + i, c)) = pack;
      }
    return;
  }
  for_tile(m, channels, to.channel != 1,
           [&](int i, int c) { store(to.at(first + i, c), from[i * pitch + c]); });
}

// Sum over the lanes of a warp, in every lane; its order does not depend on the values.
template <class A>
FRD_DEVICE A warp_sum(A v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// a . b over n elements, by the lanes of a warp; in every lane.
template <class A>
FRD_DEVICE A warp_dot(const A* a, const A* b, int n) {
  A sum = 0;
  for (int c = lane_of_warp(); c < n; c += 32) sum += a[c] * b[c];
  return warp_sum(sum);
}

template <class A>
FRD_DEVICE A team_sigmoid(A v) {
  return A(1) / (A(1) + exp(-v));
}

template <class A>
FRD_DEVICE void fill_block(A* p, int64_t n, A v) {
  for (int64_t i = threadIdx.x; i < n; i += kTeamThreads) p[i] = v;
}

// sums [., channels] at row labels[i] += weights[i] * rows[i], i in order; a label below 0 is none. A thread
// has the same channels in every call, so calls need no barrier between them.
template <class A>
FRD_DEVICE void add_by_label(const A* rows, int pitch, int m, int channels, const int32_t* labels,
                             const A* weights, A* sums) {
  for (int c = threadIdx.x; c < channels; c += kTeamThreads)
    for (int i = 0; i < m; ++i)
      if (labels[i] >= 0)
        sums[static_cast<int64_t>(labels[i]) * channels + c] += weights[i] * rows[i * pitch + c];
}

// The pixels of a bin of the grid.
struct Bin {
  int top, bottom, left, right;
};
FRD_DEVICE Bin bin_of(const RoundArgs& r, int centre) {
  const int row = centre / r.columns, column = centre % r.columns;
  return {static_cast<int>(bin_begin(row, r.height, r.rows)),
          static_cast<int>(bin_end(row, r.height, r.rows)),
          static_cast<int>(bin_begin(column, r.width, r.columns)),
          static_cast<int>(bin_end(column, r.width, r.columns))};
}

}  // namespace frd
