// Rows of an item's tokens for the gradients of the clustering, and sums of them over the tokens of a label.
#pragma once
#include "cluster/cuda/to_be_deleted/grad_args.h"
#include "cluster/cuda/to_be_deleted/product.cuh"

namespace frd {

constexpr int kRun = 4, kSlab = 32 * kRun;  // neighbouring channels of a lane, and of a warp
constexpr int kGradParts = 2;               // of the rows of a product: nothing here decides a label

template <class R>
struct alignas(kRun * sizeof(R) < 16 ? kRun * sizeof(R) : 16) Run {
  R v[kRun];
};

// v = the `left` first of kRun elements, zeros behind them.
template <class R>
FRD_DEVICE void load_run(const R* from, int left, compute_t<R> (&v)[kRun]) {
  if (left >= kRun && reinterpret_cast<uintptr_t>(from) % alignof(Run<R>) == 0) {
    const Run<R> run = *reinterpret_cast<const Run<R>*>(from);
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = load(run.v[e]);
  } else {
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = e < left ? load(from[e]) : compute_t<R>(0);
  }
}

template <class A>
FRD_DEVICE void store_run(A* to, int left, const A (&v)[kRun]) {
  if (left >= kRun && reinterpret_cast<uintptr_t>(to) % alignof(Run<A>) == 0) {
    Run<A> run;
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) run.v[e] = v[e];
    *reinterpret_cast<Run<A>*>(to) = run;
  } else {
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e)
      if (e < left) to[e] = v[e];
  }
}

// sum += scale * the run at `from`
template <class R>
FRD_DEVICE void add_run(compute_t<R> scale, const R* from, int left, compute_t<R> (&sum)[kRun]) {
  compute_t<R> v[kRun];
  load_run(from, left, v);
  FRD_UNROLL
  for (int e = 0; e < kRun; ++e) sum[e] += scale * v[e];
}

// f(first channel) for every run of this lane.
template <class F>
FRD_DEVICE void for_runs(int channels, const F& f) {
#pragma unroll 1
  for (int c = lane_of_warp() * kRun; c < channels; c += kSlab) f(c);
}

// f(row) for every row of this warp.
template <class F>
FRD_DEVICE void for_rows(int m, const F& f) {
#pragma unroll 1
  for (int i = warp_of_block(); i < m; i += kTeamWarps) f(i);
}

// The rows of block `rank` of a team: multiples of `step`, which fill the tensor cores' tiles.
FRD_DEVICE Range rows_of_block(int count, int blocks, int rank, int step) {
  const int size = ((count + blocks - 1) / blocks + step - 1) / step * step;
  const int begin = rank * size < count ? rank * size : count;
  return {begin, begin + size < count ? begin + size : count};
}

// Tokens of one item: in the tokens' dtype and any strides, or rows [N, C] of the sums' type.
template <class T>
struct TokenRows {
  using A = compute_t<T>;
  Rows<T> tokens;
  const A* own;  // null: the tokens
  int channels;

  FRD_DEVICE TokenRows of(const TokenView& view, int64_t item, int channels) {
    if (view.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) && view.channel == 1 &&
        view.token == channels)
      return {{}, static_cast<const A*>(view.data) + item * view.batch, channels};
    return {rows_of<T>(view, item), nullptr, channels};
  }

  // The run at channel c of row n; the channels must be neighbours in memory.
  __device__ void run(int64_t n, int c, A (&v)[kRun]) const {
    if (own != nullptr)
      load_run(own + n * channels + c, channels - c, v);
    else
      load_run(tokens.data + n * tokens.row + c, channels - c, v);
  }

  // to [m, pitch] = rows first .. first + m. No barrier.
  __device__ void tile(int64_t first, int m, A* to, int pitch) const {
    if (own != nullptr)
      for_rows(m, [&](int i) {
        for_runs(channels, [&](int c) {
          A v[kRun];
          load_run(own + (first + i) * channels + c, channels - c, v);
          store_run(to + i * pitch + c, channels - c, v);
        });
      });
    else
      load_tile(tokens, first, m, channels, to, pitch);
  }
};

FRD_DEVICE int lowest_bit(unsigned bits) {
#if defined(__CUDACC__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ffs(static_cast<int>(bits)) - 1;
#endif
}

// Warp `warp` of `warps` of a team, one behind another in every block so that few pieces of work spread.
template <int kBlocks>
FRD_DEVICE int warp_of_team() {
  return warp_of_block() * kBlocks + Team<kBlocks>::rank();
}

// The tokens of a sum's part.
FRD_DEVICE Range part_of(int tokens, int parts, int part) {
  return {static_cast<int>(static_cast<int64_t>(tokens) * part / parts),
          static_cast<int>(static_cast<int64_t>(tokens) * (part + 1) / parts)};
}

// sum[e] += the run at channel c of the tokens of a part with label `centre`, each times its weight, in
// order. Returns the lane's share of the sum of the weights.
template <class T>
FRD_DEVICE compute_t<T> add_label(const TokenRows<T>& rows, const int32_t* labels,
                                  const compute_t<T>* weights, Range part, int centre, int c,
                                  compute_t<T> (&sum)[kRun]) {
  using A = compute_t<T>;
  constexpr int kFlight = 4;  // rows whose loads overlap
  A total = 0;
#pragma unroll 1
  for (int first = part.begin; first < part.end; first += 32) {
    const int n = first + lane_of_warp();
    const bool mine = n < part.end && labels[n] == centre;
    const A weight = mine ? weights[n] : A(0);
    total += weight;
    unsigned found = __ballot_sync(0xffffffffu, mine);
#pragma unroll 1
    while (found != 0) {
      A v[kFlight][kRun];
      int at[kFlight];
      FRD_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        at[k] = found != 0 ? lowest_bit(found) : -1;
        found &= found - 1;
        if (at[k] >= 0) rows.run(first + at[k], c, v[k]);
      }
      FRD_UNROLL
      for (int k = 0; k < kFlight; ++k) {
        if (at[k] < 0) break;
        const A scale = __shfl_sync(0xffffffffu, weight, at[k]);
        FRD_UNROLL
        for (int e = 0; e < kRun; ++e) sum[e] += scale * v[k][e];
      }
    }
  }
  return total;
}

// sums [parts, O, C]: of the tokens of each label times their weights; totals [parts, O] of the weights, or
// null. Parts and order depend on the shapes alone. No barrier.
template <class T, int kBlocks>
FRD_DEVICE void label_sums(const TokenRows<T>& rows, const int32_t* labels, const compute_t<T>* weights,
                           int tokens, int centres, int parts, compute_t<T>* sums, compute_t<T>* totals) {
  using A = compute_t<T>;
  const int slabs = (rows.channels + kSlab - 1) / kSlab;
  const int64_t units = static_cast<int64_t>(centres) * parts * slabs;
#pragma unroll 1
  for (int64_t u = warp_of_team<kBlocks>(); u < units; u += kTeamWarps * kBlocks) {
    const int row = static_cast<int>(u / slabs), slab = static_cast<int>(u - int64_t{row} * slabs);
    const int part = row / centres, centre = row - part * centres, c = slab * kSlab + lane_of_warp() * kRun;
    A sum[kRun] = {};
    const A total = warp_sum(add_label(rows, labels, weights, part_of(tokens, parts, part), centre, c, sum));
    store_run(sums + int64_t{row} * rows.channels + c, rows.channels - c, sum);
    if (totals != nullptr && slab == 0 && lane_of_warp() == 0) totals[row] = total;
  }
}

// The sum of the values of the tokens with label `centre`, by the lanes of a warp.
template <class A>
FRD_DEVICE A label_total(const int32_t* labels, const A* values, int tokens, int centre) {
  A sum = 0;
#pragma unroll 4
  for (int n = lane_of_warp(); n < tokens; n += 32)
    if (labels[n] == centre) sum += values[n];
  return warp_sum(sum);
}

// v = the run of `parts` arrays [count, C], one behind another, added in their order.
template <class A>
FRD_DEVICE void run_of_parts(const A* sums, int parts, int64_t size, int left, A (&v)[kRun]) {
  load_run(sums, left, v);
#pragma unroll 2
  for (int p = 1; p < parts; ++p) add_run(A(1), sums + p * size, left, v);
}

}  // namespace frd
