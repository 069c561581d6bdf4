// Gradients of the first round's rows, and the ordered sums of weights and biases.
#include <type_traits>

#include "cluster/cuda/chain_grad.h"
#include "cluster/cuda/rows.cuh"
#include "core/dependent_launch.cuh"

namespace frd {
namespace chain {

// What a block knows of each of its tokens.
struct TokenGrad {
  int label;                     // below 0: masked
  int top, bottom, left, right;  // its bins, inclusive
  float inv_norm;                // 0 if the key passes no gradient
  float radial, own, weight;     // u . du; da; s scale of its centre
  __device__ bool is_masked() const { return label < 0; }
};

FRD_DEVICE TokenGrad token_grad(const GradArgs& a, int64_t item, int n) {
  const Round& r = a.round[0];
  const SavedRound& at = a.layout.round[0];
  const float* saved = a.saved + item * a.layout.size;
  TokenGrad t{};
  t.label = a.labels[item * a.label_stride + n];
  if (t.is_masked()) return t;
  const int y = n / r.width, x = n - y * r.width;
  t.top = static_cast<int>(first_bin(y, r.height, r.rows));
  t.bottom = static_cast<int>(last_bin(y, r.height, r.rows));
  t.left = static_cast<int>(first_bin(x, r.width, r.columns));
  t.right = static_cast<int>(last_bin(x, r.width, r.columns));
  const float inverse = saved[at.inv_norm + n], cosine = saved[at.cosine + n];
  t.inv_norm = is_live(inverse) ? inverse : 0.f;
  t.own = a.dense ? 0.f : a.cosine_grad[item * r.tokens() + n];
  t.radial = a.dense ? a.radial[item * r.tokens() + n] : t.own * cosine;
  const float weight = a.weighted ? 1.f / (1.f + expf(-(a.beta[0] + a.alpha[0] * cosine))) : 1.f;
  t.weight = weight * saved[at.scale + t.label];
  return t;
}

// The item's part of what grad_rows reads.
struct RowSources {
  const float* score_grad;               // [N, J], paper
  const float *inverse, *scale, *share;  // [O_1] of the pooled keys; of the means; of the bins
  Rows<const float> query, pooled, pooled_grad, means_grad;  // [J, C] paper; [O_1, C]
  int channels, last, columns;                               // C; J, or 0; centres of a row of the grid
};
FRD_DEVICE RowSources row_sources(const GradArgs& a, int64_t item) {
  const int centres = a.centres(), last = a.dense ? a.last() : 0, channels = a.channels;
  const SavedRound& at = a.layout.round[0];
  const float* saved = a.saved + item * a.layout.size;
  const auto rows = [&](const float* data, int64_t row) { return Rows<const float>{data, row, 1}; };
  return {a.score_grad + item * a.tokens() * last,
          saved + at.pooled_inv_norm,
          saved + at.scale,
          a.bin_share + item * centres,
          rows(a.query + item * last * channels, channels),
          rows(saved + at.pooled, channels),
          rows(a.pooled_grad + item * centres * channels, channels),
          rows(a.mean_grad + item * centres * a.mean_grad_row, a.mean_grad_row),
          channels,
          last,
          a.round[0].columns};
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
// A lane's channels of a run of a row: two groups of four neighbours. What lies behind the row counts as 0.
struct RowGroups {
  static constexpr int kEach = 8, kRun = 32 * kEach;
  int begin, channels;
  __device__ int channel(int e) const { return begin + e / 4 * 128 + lane_of_warp() * 4 + e % 4; }
  template <class T>
  __device__ void read(const Rows<T>& from, int64_t n, float (&v)[kEach]) const {
    FRD_UNROLL
    for (int h = 0; h < kEach; h += 4) {
      Four<std::remove_const_t<T>> four{};
      if (const int c = channel(h); c < channels)
        four = *reinterpret_cast<const Four<std::remove_const_t<T>>*>(from.data + n * from.row + c);
      FRD_UNROLL
      for (int e = 0; e < 4; ++e) v[h + e] = load(four.v[e]);
    }
  }
  template <class T>
  __device__ void write(const Rows<T>& to, int64_t n, const float (&v)[kEach]) const {
    FRD_UNROLL
    for (int h = 0; h < kEach; h += 4) {
      const int c = channel(h);
      if (c >= channels) break;
      Four<T> four;
      FRD_UNROLL
      for (int e = 0; e < 4; ++e) store(four.v[e], v[h + e]);
      *reinterpret_cast<Four<T>*>(to.data + n * to.row + c) = four;
    }
  }
};
// The same with one channel, of rows of any strides.
struct Single {
  static constexpr int kEach = 1, kRun = 32;
  int begin, channels;
  int at = begin + lane_of_warp();
  __device__ int channel(int) const { return at; }
  template <class T>
  __device__ void read(const Rows<T>& from, int64_t n, float (&v)[1]) const {
    v[0] = at < channels ? load(from.at(n, at)) : 0.f;
  }
  template <class T>
  __device__ void write(const Rows<T>& to, int64_t n, const float (&v)[1]) const {
    if (at < channels) store(to.at(n, at), v[0]);
  }
};
// Whether all rows are groups of four that lie at multiples of their size.
template <class T>
FRD_DEVICE bool are_fours(const Rows<T>& rows) {
  return rows.channel == 1 && rows.row % 4 == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % (4 * sizeof(T)) == 0;
}

// dK and dV of token n with the key k, for K channels.
template <int K, class Channels>
FRD_DEVICE void channel_grads(const RowSources& s, const TokenGrad& t, int n, const Channels& at,
                              const float (&k)[K], float (&key)[K], float (&value)[K]) {
  float row[K];
  FRD_UNROLL
  for (int e = 0; e < K; ++e) key[e] = 0;
#pragma unroll 2
  for (int j = 0; j < s.last; ++j) {
    const float score = s.score_grad[int64_t{n} * s.last + j];
    at.read(s.query, j, row);
    FRD_UNROLL
    for (int e = 0; e < K; ++e) key[e] += score * row[e];
  }
  if (s.last == 0) {
    const float own = t.own * s.inverse[t.label];
    at.read(s.pooled, t.label, row);
    FRD_UNROLL
    for (int e = 0; e < K; ++e) key[e] = own * row[e];
  }
  at.read(s.means_grad, t.label, value);
  FRD_UNROLL
  for (int e = 0; e < K; ++e) {
    key[e] = t.inv_norm * (key[e] - k[e] * t.inv_norm * t.radial);
    value[e] *= t.weight;
  }
#pragma unroll 1
  for (int y = t.top; y <= t.bottom; ++y)
#pragma unroll 1
    for (int x = t.left; x <= t.right; ++x) {
      const int o = y * s.columns + x;
      const float share = s.share[o], scaled = share * s.scale[o];
      float mean[K];
      at.read(s.pooled_grad, o, row);
      at.read(s.means_grad, o, mean);
      FRD_UNROLL
      for (int e = 0; e < K; ++e) {
        key[e] += share * row[e];
        value[e] += scaled * mean[e];
      }
    }
}

// The rows that a block reads and writes; adds: the values belong to the keys.
template <class T>
struct BlockRows {
  Rows<T> from, keys, values;
  bool adds;
  int first, count;  // tokens of the block
};

// The gradients of K channels of the block's token i; key: with the value where these are added.
template <int K, class T, class Channels>
FRD_DEVICE void token_grads(const RowSources& s, const TokenGrad& t, const BlockRows<T>& rows, int i,
                            const Channels& at, float (&key)[K]) {
  const int n = rows.first + i;
  float k[K], value[K];
  FRD_UNROLL
  for (int e = 0; e < K; ++e) key[e] = value[e] = 0;
  if (!t.is_masked()) {
    at.read(rows.from, n, k);
    channel_grads(s, t, n, at, k, key, value);
  }
  if (!rows.adds) at.write(rows.values, n, value);
  FRD_UNROLL
  for (int e = 0; e < K; ++e) key[e] += rows.adds ? value[e] : 0.f;
  at.write(rows.keys, n, key);
}

// The tokens one after the other in a warp, neighbouring lanes with neighbouring channels; sums of dK over
// the block's tokens to key_sums [C] if not null. sums [kBlockWarps, kRun] is shared.
template <class Channels, class T>
FRD_DEVICE void grads_by_token(const RowSources& s, const TokenGrad* token, const BlockRows<T>& rows,
                               float* key_sums, float* sums) {
  constexpr int kEach = Channels::kEach, kRun = Channels::kRun;
  for (int begin = 0; begin < s.channels; begin += kRun) {
    const Channels at{begin, s.channels};
    float sum[kEach] = {};
#pragma unroll 1
    for (int i = warp_of_block(); i < rows.count; i += kBlockWarps) {
      float key[kEach];
      token_grads(s, token[i], rows, i, at, key);
      FRD_UNROLL
      for (int e = 0; e < kEach; ++e) sum[e] += key[e];
    }
    if (!key_sums) continue;
    FRD_UNROLL
    for (int e = 0; e < kEach; ++e) sums[warp_of_block() * kRun + at.channel(e) - begin] = sum[e];
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    float all = 0;
    FRD_UNROLL
    for (int w = 0; w < kBlockWarps && column < kRun; ++w) all += sums[w * kRun + column];
    if (column < kRun && begin + column < s.channels) key_sums[begin + column] = all;
    __syncthreads();
  }
}

// The same with neighbouring lanes with neighbouring tokens, and no sums.
template <class T>
FRD_DEVICE void grads_by_channel(const RowSources& s, const TokenGrad* token, const BlockRows<T>& rows) {
  for (int c = warp_of_block(); c < s.channels; c += kBlockWarps)
    for (int i = lane_of_warp(); i < rows.count; i += 32) {
      float key[1];
      token_grads(s, token[i], rows, i, Single{c, s.channels, c}, key);
    }
}

// to [columns] = sums of the rows [m, columns] of this row stride
FRD_DEVICE void sum_rows(const float* from, int64_t row, int m, int column, int64_t columns, float* to) {
  if (column >= columns) return;
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < m; ++i) sum += from[i * row + column];
  to[column] = sum;
}

// Grid: a block for each run of tokens of an item; behind them, with row_sums, one for each 32 rows and 256
// columns of rows_grad.
//   dK = inv_norm (E - u radial) + sum over bins of share dKc; dV = sum over bins of share h + s h_l
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    grad_rows_kernel(const __grid_constant__ GradArgs a, const __grid_constant__ GradRows to) {
  __shared__ TokenGrad token[kMaxRunTokens];
  __shared__ float sums[kBlockWarps * RowGroups::kRun];
  wait_for_previous();
  let_next_start();
  const int tokens = a.tokens(), run = run_tokens(a), runs = token_runs(a);
  const int behind = static_cast<int>(blockIdx.x) - a.batch * runs;
  if (behind >= 0) {
    const int strips = static_cast<int>((a.rows_grad_row + kBlockThreads - 1) / kBlockThreads);
    const int first = behind / strips * kSumRows, rows = a.batch * a.centres();
    sum_rows(a.rows_grad + first * a.rows_grad_row, a.rows_grad_row,
             rows - first < kSumRows ? rows - first : kSumRows,
             behind % strips * kBlockThreads + static_cast<int>(threadIdx.x), a.rows_grad_row,
             to.row_sums + behind / strips * a.rows_grad_row);
    return;
  }
  const int64_t item = blockIdx.x / runs;
  BlockRows<T> rows{rows_of<T>(a.keys, item), rows_of<T>(to.keys, item), rows_of<T>(to.values, item)};
  rows.adds = to.values.data == nullptr;
  rows.first = static_cast<int>(blockIdx.x) % runs * run;
  rows.count = tokens - rows.first < run ? tokens - rows.first : run;
  if (static_cast<int>(threadIdx.x) < rows.count)
    token[threadIdx.x] = token_grad(a, item, rows.first + threadIdx.x);
  __syncthreads();
  const RowSources s = row_sources(a, item);
  float* const key_sums = to.key_sums ? to.key_sums + int64_t{blockIdx.x} * s.channels : nullptr;
  const bool wide = s.channels % 4 == 0 && are_fours(rows.from) && are_fours(rows.keys) &&
                    (rows.adds || are_fours(rows.values)) && are_fours(s.means_grad);
  if (wide)
    grads_by_token<RowGroups>(s, token, rows, key_sums, sums);
  else if (rows.keys.channel == 1 || key_sums)
    grads_by_token<Single>(s, token, rows, key_sums, sums);
  else
    grads_by_channel(s, token, rows);
}

// to [rows, channels] = left + right, of this row stride
__global__ void __launch_bounds__(kBlockThreads)
    add_rows_kernel(const float* left, const float* right, float* to, int64_t rows, int channels,
                    int64_t row) {
  wait_for_previous();
  let_next_start();
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i >= rows * channels) return;
  const int64_t at = i / channels * row + i % channels;
  to[at] = left[at] + right[at];
}

FRD_DEVICE void store_as(void* to, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32)
    static_cast<float*>(to)[i] = v;
  else if (dtype == DType::f16)
    store(static_cast<f16*>(to)[i], v);
  else
    store(static_cast<bf16*>(to)[i], v);
}

// Many parts are shared by 32 groups of threads of a block that has 8 elements; else a block has 256.
constexpr int kSumGroups = 32, kSumElements = kBlockThreads / kSumGroups;
FRD_HD inline bool shares_parts(const PartSum& sum) { return sum.parts >= kSumGroups; }
FRD_HD inline int sum_blocks(const PartSum& sum) {
  const int each = shares_parts(sum) ? kSumElements : kBlockThreads;
  return (sum.size + each - 1) / each;
}

// to[i] = from[i] + from[i + stride] + ..., of one of the sums a block
__global__ void __launch_bounds__(kBlockThreads) sum_grads_kernel(const __grid_constant__ PartSums sums) {
  __shared__ float part[kSumGroups][kSumElements];
  wait_for_previous();
  let_next_start();
  int which = 0, block = static_cast<int>(blockIdx.x);
  while (block >= sum_blocks(sums.sum[which])) block -= sum_blocks(sums.sum[which++]);
  const PartSum& s = sums.sum[which];
  const bool shared = shares_parts(s);
  const int thread = static_cast<int>(threadIdx.x), group = shared ? thread / kSumElements : 0;
  const int i = shared ? block * kSumElements + thread % kSumElements : block * kBlockThreads + thread;
  float sum = 0;
  if (i < s.size) {
#pragma unroll 8
    for (int p = group; p < s.parts; p += shared ? kSumGroups : 1) sum += s.from[p * s.stride + i];
  }
  if (shared) {
    part[group][thread % kSumElements] = sum;
    __syncthreads();
    sum = 0;
    for (int g = 0; g < kSumGroups; ++g) sum += part[g][thread % kSumElements];
  }
  if (group == 0 && i < s.size) store_as(s.to, s.dtype, i, sum);
}

namespace {

unsigned blocks_of(int64_t n, int64_t by) { return static_cast<unsigned>((n + by - 1) / by); }

template <class T>
cudaError_t launch_rows(const GradArgs& a, const GradRows& to, cudaStream_t stream) {
  unsigned blocks = a.batch * token_runs(a);
  if (to.row_sums)
    blocks += blocks_of(int64_t{a.batch} * a.centres(), kSumRows) * blocks_of(a.rows_grad_row, kBlockThreads);
  return FRD_LAUNCH_DEPENDENT(grad_rows_kernel<T>, dim3(blocks), dim3(kBlockThreads), 0, stream, a, to);
}

}  // namespace

cudaError_t grad_rows(const GradArgs& a, const GradRows& to, cudaStream_t stream) {
  switch (to.keys.dtype) {
    case DType::f32:
      return launch_rows<f32>(a, to, stream);
    case DType::f16:
      return launch_rows<f16>(a, to, stream);
    default:
      return launch_rows<bf16>(a, to, stream);
  }
}

cudaError_t add_rows(const GradArgs& a, const float* left, const float* right, float* to,
                     cudaStream_t stream) {
  const int64_t rows = int64_t{a.batch} * a.centres();
  return FRD_LAUNCH_DEPENDENT(add_rows_kernel, dim3(blocks_of(rows * a.channels, kBlockThreads)),
                              dim3(kBlockThreads), 0, stream, left, right, to, rows, a.channels,
                              a.rows_grad_row);
}

cudaError_t sum_grads(const PartSums& sums, cudaStream_t stream) {
  int blocks = 0;
  for (int i = 0; i < sums.count; ++i) blocks += sum_blocks(sums.sum[i]);
  if (blocks == 0) return cudaSuccess;
  return FRD_LAUNCH_DEPENDENT(sum_grads_kernel, dim3(blocks), dim3(kBlockThreads), 0, stream, sums);
}

}  // namespace chain
}  // namespace frd
