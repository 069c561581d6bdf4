// Round 1: means of the values of each label, by a counting sort of the labels.
#include <algorithm>
#include <cstdint>

#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

constexpr int kSliceChannels = 32, kSliceCentres = 64;  // of a block
// Most tokens in shared memory at a time: 64 KiB of values.
template <class T>
constexpr int kChunkTokens = 65536 / kSliceChannels / static_cast<int>(sizeof(T));

// How a block's values come to shared memory: as [chunk, 32] by groups of 16 bytes or elements, or as
// [32, pitch] (`inner`) by words of 4 bytes or elements; pitch: an odd number of words.
struct AggregatePlan {
  int channel_slices, centre_slices;
  int chunk, pitch;
  bool inner, copied;
};

struct AggregateShared {
  int count[kBlockWarps][kSliceCentres];
  int begin[kSliceCentres + 1];
  float sum[kSliceCentres][kSliceChannels], mass[kSliceCentres];  // so far; a row is of one warp alone
  int tokens[kSliceCentres];
};

// A chunk [n, channels] of the values from `from` on; x: kSliceChannels of them.
template <class T>
FRD_DEVICE void fetch_values(const AggregatePlan& p, const TokenView& v, const T* from, int n, int channels,
                             T* x) {
  constexpr int kGroupSize = 16 / sizeof(T), kWordSize = 4 / sizeof(T), kGroups = kSliceChannels / kGroupSize;
  const int pitch = p.inner ? p.pitch : kSliceChannels;
  if (p.copied && p.inner) {
    const int words = (n + kWordSize - 1) / kWordSize;
    for (int c = warp_of_block(); c < channels; c += kBlockWarps)
      for (int w = lane_of_warp(); w < words; w += 32) {
        const int first = w * kWordSize, left = n - first < kWordSize ? n - first : kWordSize;
        cp_async_4(x + c * pitch + first, from + c * v.channel + first, left * static_cast<int>(sizeof(T)));
      }
  } else if (p.copied) {
    for (int i = threadIdx.x; i < n * kGroups; i += kBlockThreads) {
      const int token = i / kGroups, c = i % kGroups * kGroupSize;
      if (c < channels) cp_async_16(x + token * pitch + c, from + token * v.token + c, 16);
    }
  } else {
    for_tile(n, channels, p.inner, [&](int token, int c) {
      x[p.inner ? c * pitch + token : token * pitch + c] = from[token * v.token + c * v.channel];
    });
  }
  cp_async_commit();
}

// order [n]: tokens of the labels first .. + 64, sorted by label and within one ascending; those of label
// first + o lie at s.begin[o] .. s.begin[o + 1].
template <int kTokens>
FRD_DEVICE void sort_by_label(const int32_t* labels, int n, int first, AggregateShared& s, uint16_t* order) {
  constexpr int kRuns = kTokens / kBlockThreads;  // of 32 tokens, of a warp
  const int warp = warp_of_block(), lane = lane_of_warp();
  const int runs = (n + kBlockThreads - 1) / kBlockThreads, token0 = warp * runs * 32 + lane;
  int label[kRuns], rank[kRuns];
  int* const count = s.count[warp];
  FRD_UNROLL
  for (int u = 0; u < kRuns; ++u) {
    const int token = token0 + u * 32;
    label[u] = u < runs && token < n ? labels[token] - first : -1;
    if (label[u] >= kSliceCentres) label[u] = -1;
  }
  count[lane] = count[lane + 32] = 0;
  __syncwarp();
  FRD_UNROLL
  for (int u = 0; u < kRuns; ++u) {
    const unsigned equal = __match_any_sync(0xffffffffu, label[u] < 0 ? -1 : label[u]);
    const int before = __popc(equal & ((1u << lane) - 1)), base = label[u] < 0 ? 0 : count[label[u]];
    rank[u] = base + before;
    __syncwarp();
    if (label[u] >= 0 && before == 0) count[label[u]] = base + __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  if (warp == 0) {  // two labels a lane: where each warp's tokens begin
    int total[2] = {};
    FRD_UNROLL
    for (int e = 0; e < 2; ++e)
      for (int w = 0; w < kBlockWarps; ++w) {
        int& c = s.count[w][2 * lane + e];
        const int own = c;
        c = total[e];
        total[e] += own;
      }
    int end = total[0] + total[1];
    FRD_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, end, step);
      if (lane >= step) end += other;
    }
    s.begin[2 * lane] = end - total[0] - total[1];
    s.begin[2 * lane + 1] = end - total[1];
    if (lane == 31) s.begin[kSliceCentres] = end;
  }
  __syncthreads();
  FRD_UNROLL
  for (int u = 0; u < kRuns; ++u)
    if (label[u] >= 0)
      order[s.begin[label[u]] + count[label[u]] + rank[u]] = static_cast<uint16_t>(token0 + u * 32);
}

// Zeros in the gaps behind the parts of an item's `saved`, so that all of it is written.
FRD_DEVICE void fill_gaps(const Forward& a, float* saved) {
  const auto fill = [&](int64_t begin, int64_t floats) {
    const int64_t i = begin + floats + threadIdx.x;
    if (i < begin + (floats + 3) / 4 * 4) saved[i] = 0;
  };
  int64_t links = 0;
#pragma unroll 1
  for (int t = 0; t < a.count; ++t) {
    const int64_t tokens = a.round[t].tokens(), centres = a.round[t].centres();
    const SavedRound& at = a.at.round[t];
    fill(at.inv_norm, tokens), fill(at.cosine, tokens);
    fill(at.pooled, centres * a.channels), fill(at.pooled_inv_norm, centres), fill(at.scale, centres);
    if (a.dense) fill(at.matrix, tokens * centres);
    if (a.out.data) fill(at.rows, centres * (a.count - t) * a.channels);
    if (t > 0) links += tokens * a.round[a.count - 1].centres();
  }
  fill(a.at.mean, int64_t{a.round[0].centres()} * a.channels);
  if (a.dense) fill(a.at.links, links);
}

// A block's part of the centres and channels of an item.
struct AggregateTile {
  int64_t item;
  int centre0, centres, channel0, channels;
  bool first_channels;
};

// Begins with the bin means.
FRD_DEVICE void start_sums(const Forward& a, const AggregateTile& t, AggregateShared& s) {
  const float* const pooled = a.pooled_values + (t.item * a.round[0].centres() + t.centre0) * a.channels;
  const int lane = lane_of_warp();
  FRD_UNROLL
  for (int k = 0; k < kSliceCentres / kBlockWarps; ++k) {
    const int o = warp_of_block() + k * kBlockWarps;
    const bool inside = o < t.centres && lane < t.channels;
    s.sum[o][lane] = inside ? pooled[static_cast<int64_t>(o) * a.channels + t.channel0 + lane] : 0.f;
    if (lane == 0) s.mass[o] = 0.f, s.tokens[o] = 0;
  }
}

template <class T>
FRD_DEVICE void write_mean(const Forward& a, const AggregateTile& t, int o, float sum, float mass,
                           int tokens) {
  const int lane = lane_of_warp(), centre = t.centre0 + o, c = t.channel0 + lane;
  if (o >= t.centres || lane >= t.channels) return;
  float* const saved = a.saved + t.item * a.at.size;
  const float scale = 1.f / (1.f + mass), mean = sum * scale;
  saved[a.at.mean + static_cast<int64_t>(centre) * a.channels + c] = mean;
  if (a.centres.data) store(*in_global(&rows_of<T>(a.centres, t.item).at(centre, c)), mean);
  if (!t.first_channels || lane > 0) return;
  saved[a.at.round[0].scale + centre] = scale;
  if (a.counts) in_global(a.counts)[t.item * a.round[0].centres() + centre] = tokens;
}

// mean [O, C] = scale (pooled + sum of w v over the tokens of the label), scale [O] = 1 / (1 + sum of w),
// where w = 1 or the gate
template <class T, bool kWeighted>
__global__ void __launch_bounds__(kBlockThreads, 3)
    aggregate_kernel(const __grid_constant__ Forward a, const __grid_constant__ AggregatePlan p) {
  FRD_DYNAMIC_SHARED(uint4, shared);
  __shared__ AggregateShared s;
  const int tokens = a.round[0].tokens(), lane = lane_of_warp();
  const int slice = static_cast<int>(blockIdx.x) % p.channel_slices, rest = blockIdx.x / p.channel_slices;
  AggregateTile t{rest / p.centre_slices,
                  rest % p.centre_slices * kSliceCentres,
                  0,
                  slice * kSliceChannels,
                  0,
                  slice == 0};
  t.centres = a.round[0].centres() - t.centre0;
  t.channels = a.channels - t.channel0 < kSliceChannels ? a.channels - t.channel0 : kSliceChannels;
  T* const x = reinterpret_cast<T*>(shared);
  float* const weight = reinterpret_cast<float*>(x + kSliceChannels * p.pitch);
  uint16_t* const order = reinterpret_cast<uint16_t*>(weight + (kWeighted ? p.chunk : 0));
  const T* const values =
      static_cast<const T*>(a.values.data) + t.item * a.values.batch + t.channel0 * a.values.channel;
  const int32_t* const labels = a.labels + t.item * a.label_stride + a.round[0].labels;
  float* const saved = a.saved + t.item * a.at.size;
  const int token_step = p.inner ? 1 : kSliceChannels;
  start_sums(a, t, s);  // of the last launch but one
  for (int first = 0; first < tokens; first += p.chunk) {
    const int n = tokens - first < p.chunk ? tokens - first : p.chunk;
    if (first > 0) __syncthreads();
    fetch_values(p, a.values, values + first * a.values.token, n, t.channels, x);
    if (first == 0) {
      wait_for_previous();
      let_next_start();
    }
    if (kWeighted)
      for (int i = threadIdx.x; i < n; i += kBlockThreads)
        weight[i] = gate_of(a, 0, saved[a.at.round[0].cosine + first + i]);
    sort_by_label<kChunkTokens<T>>(labels + first, n, t.centre0, s, order);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 2
    for (int o = warp_of_block(); o < kSliceCentres; o += kBlockWarps) {
      const int end = s.begin[o + 1], count = s.tokens[o] + end - s.begin[o];
      float sum = s.sum[o][lane], mass = s.mass[o];
#pragma unroll 4
      for (int i = s.begin[o]; i < end; ++i) {
        const int token = order[i];
        const float v = load(x[token * token_step + lane * (p.inner ? p.pitch : 1)]);
        sum += kWeighted ? weight[token] * v : v;
        if (kWeighted) mass += weight[token];
      }
      if (first + n == tokens) {
        write_mean<T>(a, t, o, sum, kWeighted ? mass : static_cast<float>(count), count);
        continue;
      }
      __syncwarp();
      s.sum[o][lane] = sum;
      if (lane == 0) s.mass[o] = mass, s.tokens[o] = count;
    }
  }
  if (t.first_channels && t.centre0 == 0) fill_gaps(a, saved);
}

namespace {

template <class T>
AggregatePlan plan_aggregate(const Forward& a) {
  constexpr int64_t kGroupSize = 16 / sizeof(T), kWordSize = 4 / sizeof(T);
  const TokenView& v = a.values;
  const auto aligned = [&](int64_t elements, int64_t other) {
    return other % elements == 0 && v.batch % elements == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % (elements * sizeof(T)) == 0;
  };
  AggregatePlan p{};
  p.channel_slices = (a.channels + kSliceChannels - 1) / kSliceChannels;
  p.centre_slices = (a.round[0].centres() + kSliceCentres - 1) / kSliceCentres;
  p.chunk = std::min(kChunkTokens<T>, (a.round[0].tokens() + 3) / 4 * 4);
  p.pitch = p.chunk + static_cast<int>(kWordSize);
  p.inner = v.token == 1 && v.channel != 1;
  p.copied = p.inner ? aligned(kWordSize, v.channel)
                     : v.channel == 1 && a.channels % kGroupSize == 0 && aligned(kGroupSize, v.token);
  return p;
}

template <class T>
cudaError_t run(const Forward& a, cudaStream_t stream) {
  const AggregatePlan p = plan_aggregate<T>(a);
  const int bytes = kSliceChannels * p.pitch * static_cast<int>(sizeof(T)) + p.chunk * (a.weighted ? 6 : 2);
  const auto kernel = a.weighted ? aggregate_kernel<T, true> : aggregate_kernel<T, false>;
  return FRD_LAUNCH_DEPENDENT(kernel,
                              dim3(static_cast<unsigned>(a.batch * p.channel_slices * p.centre_slices)),
                              dim3(kBlockThreads), bytes, stream, a, p);
}

}  // namespace

cudaError_t run_aggregate(const Forward& a, cudaStream_t stream) {
  return a.dtype == DType::f32   ? run<f32>(a, stream)
         : a.dtype == DType::f16 ? run<f16>(a, stream)
                                 : run<bf16>(a, stream);
}

}  // namespace chain
}  // namespace frd
