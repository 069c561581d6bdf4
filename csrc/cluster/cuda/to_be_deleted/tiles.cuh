// Steps on tiles of tokens that the clustering's kernels share, for the kTeamThreads threads of a block.
// Tiles are rows [m, pitch] of the compute type, in shared or global memory.
#pragma once
#include "cluster/cuda/rows.cuh"
#include "cluster/cuda/to_be_deleted/args.h"
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
