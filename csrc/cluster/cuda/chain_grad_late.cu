// From the gradients of the last centres and of the cosines to those of Z: the rounds T .. 2.
#include "cluster/cuda/chain_grad_rules.cuh"

namespace frd {
namespace chain {

constexpr int kLateThreads = 512, kLateWarps = kLateThreads / 32;
constexpr int kLateBlocks = 4;          // of an item with its scratch in shared memory
constexpr int kLateShared = 96 * 1024;  // bytes of shared memory that the smallest device gives a block

// Parts of an item's scratch, by round from 0: offsets in floats. N_t tokens, O_t centres; J = O_(T-1).
// S_t = M_t ... M_(T-1), dS_(t+1) = M_t^T dS_t.
struct LateRound {
  int64_t link;  // t > 0, in `saved`: [N_t, J] S_t
  int score;     // t > 0: [N_t, J] dS_t; also t = T: [J, J]. released: [N_t] gradient of the own cosine
  int flow;      // t > 0, released: [N_t] gradient of the product of the weights from round t on, then of
                 // what the rounds after t make of it
  int unit;      // [J, C] U_t = dS_t^T u_t, paper
  int query;     // t > 0: [J, C] Q_t = S_(t+1)^T c_t, paper
  int key;       // t > 0: [O_t, C] gradient of the pooled keys
  int rows;      // t > 0: [O_t, (T - t) C] gradient of saved.rows
};
struct LateLayout {
  LateRound round[kMaxRounds + 1];
  int size;
};
inline LateLayout late_layout(const GradArgs& a) {
  LateLayout s{};
  const auto take = [&](int floats) {
    const int at = s.size;
    s.size += floats;
    return at;
  };
  const int last = a.last(), channels = a.channels;
  int64_t link = a.layout.links;
  for (int t = 0; t < a.count; ++t) {
    const int tokens = a.round[t].tokens(), centres = a.round[t].centres();
    LateRound& r = s.round[t];
    r.unit = take(a.dense ? last * channels : 0);
    if (t == 0) continue;
    r.link = link, link += tokens * last;
    r.score = take(a.dense ? tokens * last : tokens);
    r.flow = take(a.dense ? 0 : tokens);
    r.query = take(a.dense ? last * channels : 0);
    r.key = take(centres * channels);
    r.rows = take(centres * (a.count - t) * channels);
  }
  s.round[a.count].score = take(a.dense ? last * last : 0);
  return s;
}

// An item in the eyes of one of its blocks. Each makes all of the scratch, and its share of the results.
struct LateItem {
  const GradArgs& a;
  const LateLayout& at;
  float* scratch;
  int64_t item;
  int channels, last;  // C, J
  int block, blocks;

  __device__ const float* saved() const { return a.saved + item * a.layout.size; }
  __device__ const SavedRound& kept(int t) const { return a.layout.round[t]; }
  __device__ const int32_t* labels(int t) const {
    return a.labels + item * a.label_stride + a.round[t].labels;
  }
  // Keys of the tokens of round t > 0: rows of this stride.
  __device__ const float* keys(int t) const { return saved() + kept(t - 1).rows; }
  __device__ int key_row(int t) const { return (a.count - t + 1) * channels; }
  __device__ float pooled(int t, int o, int c) const {  // unit key
    return saved()[kept(t).pooled + o * channels + c] * saved()[kept(t).pooled_inv_norm + o];
  }
  __device__ float weight(int t, int n) const {
    return a.weighted ? sigmoid(a.beta[t] + a.alpha[t] * saved()[kept(t).cosine + n]) : 1.f;
  }
};

// The sums over an item's runs of up to three of the parts [runs, size], to `to` [size] in the scratch; at -1
// the first is dZ, rows of C channels.
struct RunSum {
  const float* parts;
  int size, to;
};
FRD_DEVICE void sum_runs(const LateItem& s, const RunSum (&sums)[3]) {
  const int runs = s.a.chunks;
  const float* from[3];
  int most = 0;
  FRD_UNROLL
  for (int q = 0; q < 3; ++q) {
    from[q] = sums[q].parts + s.item * runs * sums[q].size;
    most = most < sums[q].size ? sums[q].size : most;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < most; i += kLateThreads) {
    float sum[3] = {};  // together, as their loads overlap
#pragma unroll 4
    for (int p = 0; p < runs; ++p) {
      FRD_UNROLL
      for (int q = 0; q < 3; ++q)
        if (i < sums[q].size) sum[q] += from[q][int64_t{p} * sums[q].size + i];
    }
    FRD_UNROLL
    for (int q = 0; q < 3; ++q)
      if (i < sums[q].size && sums[q].to >= 0) s.scratch[sums[q].to + i] = sum[q];
    if (sums[0].to < 0 && i < sums[0].size)
      s.a.rows_grad[(s.item * s.last + i / s.channels) * s.a.rows_grad_row + i % s.channels] = sum[0];
  }
  __syncthreads();
}

FRD_DEVICE Warps block_warps() { return {warp_of_block(), kLateWarps}; }
FRD_DEVICE Warps item_warps(const LateItem& s) {
  return {warp_of_block() * s.blocks + s.block, kLateWarps * s.blocks};
}

// ---- the keys' gradients ----

// dKc = (S_(t+1) U - c (S_(t+1) . dS_(t+1))) inv_norm, Q = S_(t+1)^T c; S_T = 1. Those of round 0 are
// results.
FRD_DEVICE void pooled_grads(const LateItem& s, int t) {
  constexpr int kEach = 8;
  const int centres = s.a.round[t].centres(), channels = s.channels, last = s.last, lane = lane_of_warp();
  const float *unit = s.scratch + s.at.round[t].unit, *score = s.scratch + s.at.round[t + 1].score;
  const float* link = s.saved() + s.at.round[t + 1].link;
  const bool ends = t == s.a.count - 1;
  const Warps warps = t == 0 ? item_warps(s) : block_warps();
  const auto give = [&](int part, float* result, int i, float v) {
    if (t == 0)
      result[i] = v;
    else
      s.scratch[part + i] = v;
  };
  float* const keys = s.a.pooled_grad + s.item * centres * channels;
  float* const queries = s.a.query + s.item * last * channels;
#pragma unroll 1
  for (int o = warps.own; o < centres; o += warps.count) {
    const float inverse = if_live(s.saved()[s.kept(t).pooled_inv_norm + o]);
    float radial = ends ? score[o * last + o] : 0.f;
    for (int j = 0; !ends && j < last; ++j) radial += link[o * last + j] * score[o * last + j];
#pragma unroll 1
    for (int begin = lane; begin < channels; begin += 32 * kEach) {
      float v[kEach] = {};
#pragma unroll 1
      for (int j = 0; j < (ends ? 1 : last); ++j) {
        const float product = ends ? 1.f : link[o * last + j];
        const float* row = unit + (ends ? o : j) * channels;
        FRD_UNROLL
        for (int e = 0; e < kEach; ++e)
          if (begin + e * 32 < channels) v[e] += product * row[begin + e * 32];
      }
      float own[kEach];  // all loaded before the first result is stored
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e)
        own[e] = begin + e * 32 < channels ? s.pooled(t, o, begin + e * 32) : 0.f;
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const int c = begin + e * 32;
        if (c >= channels) break;
        give(s.at.round[t].key, keys, o * channels + c, (v[e] - own[e] * radial) * inverse);
        if (ends) give(s.at.round[t].query, queries, o * channels + c, own[e]);
      }
    }
  }
  if (ends) return;
  narrow_product(
      warps, centres, last, channels, [&](int o, int j) { return link[o * last + j]; },
      [&](int o, int c) { return s.pooled(t, o, c); },
      [&](int j, int c, float sum) { give(s.at.round[t].query, queries, j * channels + c, sum); });
}

// dS_(t+1) = M_t^T dS_t and U_t = dS_t^T u_t, t > 0: one product, with the columns of both
FRD_DEVICE void score_grads(const LateItem& s, int t) {
  const int tokens = s.a.round[t].tokens(), centres = s.a.round[t].centres(), last = s.last;
  const int channels = s.channels, row = s.key_row(t);
  const float *score = s.scratch + s.at.round[t].score, *matrix = s.saved() + s.kept(t).matrix;
  const float *keys = s.keys(t), *inverse = s.saved() + s.kept(t).inv_norm;
  float *next = s.scratch + s.at.round[t + 1].score, *unit = s.scratch + s.at.round[t].unit;
  narrow_product(
      block_warps(), tokens, last, centres + channels, [&](int n, int j) { return score[n * last + j]; },
      [&](int n, int i) {
        return i < centres ? matrix[n * centres + i] : keys[n * row + i - centres] * inverse[n];
      },
      [&](int j, int i, float sum) {
        (i < centres ? next[i * last + j] : unit[j * channels + i - centres]) = sum;
      });
}

// Of the own cosines of round t > 0, for a warp and the run of 256 channels from `begin`:
//   dKc_o = (sum of da u - c_o sum of da cos) inv_norm, both over the tokens of label o
FRD_DEVICE void label_grads(const LateItem& s, int t, int o, int begin) {
  constexpr int kEach = 8;
  const int tokens = s.a.round[t].tokens(), channels = s.channels, row = s.key_row(t);
  const int lane = lane_of_warp();
  const int32_t* labels = s.labels(t);
  const float *grad = s.scratch + s.at.round[t].score, *keys = s.keys(t) + begin;
  float sum[kEach] = {}, radial = 0;
#pragma unroll 1
  for (int first = 0; first < tokens; first += 32) {
    const int n = first + lane;
    unsigned found = __ballot_sync(0xffffffffu, n < tokens && labels[n] == o);
#pragma unroll 1
    while (found != 0) {
      const int member = first + lowest_bit(found);
      found &= found - 1;
      radial += grad[member] * s.saved()[s.kept(t).cosine + member];
      const float scale = grad[member] * s.saved()[s.kept(t).inv_norm + member];
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (begin + e * 32 + lane < channels) sum[e] += scale * keys[member * row + e * 32 + lane];
    }
  }
  const float inverse = if_live(s.saved()[s.kept(t).pooled_inv_norm + o]);
  float* to = s.scratch + s.at.round[t].key + o * channels;
  FRD_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const int c = begin + e * 32 + lane;
    if (c < channels) to[c] = (sum[e] - s.pooled(t, o, c) * radial) * inverse;
  }
}

// ---- gradients of rows ----

// What a token of round t > 0 hands on, by a warp: give(c, v) for c < (T - t + 1) C, the gradient of its key,
// then A_t^T drows.
//   dK = inv_norm (E - u radial) + sum over its bins of dKc / pixels; E = dS Q, radial = S . dS, or
//   E = da c_l, radial = da cos
template <bool kDense, class G>
FRD_DEVICE void token_key_grad(const LateItem& s, int t, int n, const G& give) {
  constexpr int kEach = 8;
  const LateRound& at = s.at.round[t];
  const int channels = s.channels, last = s.last, lane = lane_of_warp();
  const float inverse = if_live(s.saved()[s.kept(t).inv_norm + n]);
  const float *score = s.scratch + at.score + (kDense ? n * last : n), *key = s.keys(t) + n * s.key_row(t);
  float radial = 0;
  if (kDense)
    for (int j = 0; j < last; ++j) radial += score[j] * s.saved()[at.link + n * last + j];
  else
    radial = score[0] * s.saved()[s.kept(t).cosine + n];
#pragma unroll 1
  for (int begin = 0; begin < channels; begin += 32 * kEach) {
    float v[kEach] = {};
    const auto for_own = [&](const auto& f) {
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (begin + e * 32 + lane < channels) f(v[e], begin + e * 32 + lane);
    };
    if (kDense) {
#pragma unroll 1
      for (int j = 0; j < last; ++j)
        for_own([&](float& x, int c) { x += score[j] * s.scratch[at.query + j * channels + c]; });
    } else {
      const int label = s.labels(t)[n];
      for_own([&](float& x, int c) { x = score[0] * s.pooled(t, label, c); });
    }
    for_own([&](float& x, int c) { x = inverse * (x - key[c] * inverse * radial); });
    for_bins(s.a.round[t], n, [&](int o, const Bin& bin) {
      const float share = 1.f / static_cast<float>(bin.pixels());
      for_own([&](float& x, int c) { x += share * s.scratch[at.key + o * channels + c]; });
    });
    for_own([&](float x, int c) { give(c, x); });
  }
}

template <class G>
FRD_DEVICE void token_mean_grad(const LateItem& s, int t, int n, const G& give) {
  constexpr int kEach = 8;
  const int label = s.labels(t)[n], lane = lane_of_warp(), width = (s.a.count - t) * s.channels;
  const float* from = s.scratch + s.at.round[t].rows;
  const float *scale = s.saved() + s.kept(t).scale, own = s.weight(t, n) * scale[label];
#pragma unroll 1
  for (int begin = 0; begin < width; begin += 32 * kEach) {
    float v[kEach];
    const auto for_own = [&](const auto& f) {
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e)
        if (begin + e * 32 + lane < width) f(v[e], begin + e * 32 + lane);
    };
    for_own([&](float& x, int c) { x = own * from[label * width + c]; });
    for_bins(s.a.round[t], n, [&](int o, const Bin& bin) {
      const float share = scale[o] / static_cast<float>(bin.pixels());
      for_own([&](float& x, int c) { x += share * from[o * width + c]; });
    });
    for_own([&](float x, int c) { give(s.channels + c, x); });
  }
}

// drows of round t - 1 from those of round t; those of round 0 are a result.
template <bool kDense>
FRD_DEVICE void rows_grads(const LateItem& s, int t) {
  const int tokens = s.a.round[t].tokens(), width = s.key_row(t);
  const Warps warps = t == 1 ? item_warps(s) : block_warps();
#pragma unroll 1
  for (int n = warps.own; n < tokens; n += warps.count) {
    float* const result = s.a.rows_grad + (s.item * tokens + n) * s.a.rows_grad_row;
    const auto give = [&](int c, float v) {
      if (t == 1)
        result[c] = v;
      else
        s.scratch[s.at.round[t - 1].rows + n * width + c] = v;
    };
    token_key_grad<kDense>(s, t, n, give);
    token_mean_grad(s, t, n, give);
  }
  __syncthreads();
}

// Where dR_T goes, the gradient of the rows of the last round.
FRD_DEVICE int last_rows(const LateItem& s) { return s.a.count > 1 ? s.at.round[s.a.count - 1].rows : -1; }

// ---- variant paper ----

FRD_DEVICE void dense_late(const LateItem& s) {
  const GradArgs& a = s.a;
  const int count = a.count, centres = a.centres(), last = s.last;
  for (int o = threadIdx.x; o < centres; o += kLateThreads)
    a.bin_share[s.item * centres + o] = 1.f / static_cast<float>(bin_of(a.round[0], o).pixels());
  sum_runs(s, {{a.last_parts, last * s.channels, last_rows(s)},
               {a.unit_parts, last * s.channels, s.at.round[0].unit},
               {a.product_parts, centres * last, s.at.round[1].score}});
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    if (t + 1 < count) score_grads(s, t + 1);
    pooled_grads(s, t);
    __syncthreads();
  }
#pragma unroll 1
  for (int t = count - 1; t > 0; --t) rows_grads<true>(s, t);
}

// ---- released ----

// score_t = the part of ds_t that comes from the dispatch, along the chains of labels
FRD_DEVICE void follow_flows(const LateItem& s) {
  const GradArgs& a = s.a;
#pragma unroll 1
  for (int t = 1; t < a.count; ++t) {
    const int tokens = a.round[t].tokens(), centres = a.round[t].centres();
    float *flow = s.scratch + s.at.round[t].flow, *score = s.scratch + s.at.round[t].score;
    for (int n = threadIdx.x; n < tokens; n += kLateThreads) {
      const float grad = flow[n];
      score[n] = grad * follow(a, s.item, t + 1, s.labels(t)[n]).weight;
      flow[n] = grad * s.weight(t, n);
    }
    __syncthreads();
    if (t + 1 == a.count) return;
    for (int o = warp_of_block(); o < centres; o += kLateWarps) {
      float sum = 0;
      for (int n = lane_of_warp(); n < tokens; n += 32)
        if (s.labels(t)[n] == o) sum += flow[n];
      sum = warp_sum(sum);
      if (lane_of_warp() == 0) s.scratch[s.at.round[t + 1].flow + o] = sum;
    }
    __syncthreads();
  }
}

// ds_n += scale drows_l . (values_n - rows_l); score = da = alpha s (1 - s) ds; the gates' gradients.
FRD_DEVICE void weight_grads(const LateItem& s, int t) {
  const GradArgs& a = s.a;
  const int tokens = a.round[t].tokens(), width = (a.count - t) * s.channels, lane = lane_of_warp();
  const float *grads = s.scratch + s.at.round[t].rows, *rows = s.saved() + s.kept(t).rows;
  float* score = s.scratch + s.at.round[t].score;
  double alpha = 0, beta = 0;
#pragma unroll 1
  for (int n = warp_of_block(); n < tokens; n += kLateWarps) {
    const int label = s.labels(t)[n];
    const float *grad = grads + label * width, *row = rows + label * width;
    const float* value = s.keys(t) + n * s.key_row(t) + s.channels;
    float along = 0;
#pragma unroll 4
    for (int c = lane; c < width; c += 32) along += grad[c] * (value[c] - row[c]);
    along = warp_sum(along) * s.saved()[s.kept(t).scale + label];
    const float cosine = s.saved()[s.kept(t).cosine + n];
    const float argument = (score[n] + along) * sigmoid_slope(a.beta[t] + a.alpha[t] * cosine);
    alpha += static_cast<double>(argument) * cosine, beta += argument;
    __syncwarp();
    if (lane == 0) score[n] = a.alpha[t] * argument;
  }
  const int64_t gate = (int64_t{t} * a.batch * a.chunks + s.item) * 2;
  give_gates<kLateWarps>(lane == 0 ? alpha : 0, lane == 0 ? beta : 0, a.gate_parts + gate);
}

FRD_DEVICE void chained_late(const LateItem& s) {
  const GradArgs& a = s.a;
  const int flows = a.count > 1 ? a.centres() : 0;
  sum_runs(s, {{a.last_parts, s.last * s.channels, last_rows(s)},
               {a.chain_parts, flows, s.at.round[1].flow},
               {a.chain_parts, 0, 0}});
  follow_flows(s);
#pragma unroll 1
  for (int t = a.count - 1; t > 0; --t) {
    weight_grads(s, t);
    const int centres = a.round[t].centres(), slabs = (s.channels + 255) / 256;
#pragma unroll 1
    for (int i = warp_of_block(); i < centres * slabs; i += kLateWarps)
      label_grads(s, t, i / slabs, i % slabs * 256);
    __syncthreads();
    rows_grads<false>(s, t);
  }
}

// kLateBlocks blocks an item if kShared, with the scratch in shared memory, else one.
//   drows_T = dR_T; drows_(t-1) = [dK_t + Pool^T dKc_t | A_t^T drows_t] for t = T .. 2; dZ = drows_1
template <bool kDense, bool kShared>
__global__ void __launch_bounds__(kLateThreads, 1)
    grad_late_kernel(const __grid_constant__ GradArgs a, const __grid_constant__ LateLayout layout) {
  FRD_DYNAMIC_SHARED(float4, shared);
  wait_for_previous();
  let_next_start();
  const int blocks = kShared ? kLateBlocks : 1;
  const int64_t item = blockIdx.x / blocks;
  float* scratch = kShared ? reinterpret_cast<float*>(shared) : a.late + item * a.late_stride;
  const int block = static_cast<int>(blockIdx.x % blocks);
  const LateItem s{a, layout, scratch, item, a.channels, a.last(), block, blocks};
  if constexpr (kDense)
    dense_late(s);
  else
    chained_late(s);
}

namespace {

template <bool kDense, bool kShared>
cudaError_t launch(const GradArgs& a, const LateLayout& layout, cudaStream_t stream) {
  return FRD_LAUNCH_DEPENDENT((grad_late_kernel<kDense, kShared>),
                              dim3(a.batch * (kShared ? kLateBlocks : 1)), dim3(kLateThreads),
                              kShared ? layout.size * 4 : 0, stream, a, layout);
}

bool fits_shared(const LateLayout& layout) { return layout.size <= kLateShared / 4; }

}  // namespace

int64_t late_grad_size(const GradArgs& a) {
  const LateLayout layout = late_layout(a);
  return fits_shared(layout) ? 0 : layout.size;
}

cudaError_t grad_late(const GradArgs& a, cudaStream_t stream) {
  const LateLayout layout = late_layout(a);
  if (a.dense)
    return fits_shared(layout) ? launch<true, true>(a, layout, stream)
                               : launch<true, false>(a, layout, stream);
  return fits_shared(layout) ? launch<false, true>(a, layout, stream)
                             : launch<false, false>(a, layout, stream);
}

}  // namespace chain
}  // namespace frd
