// Gradients of the projections: sums over the rows of the whole batch, in parts of kPartRows rows that a
// second kernel adds in their order, and with them the gates' parts.
#pragma once
#include "cluster/cuda/to_be_deleted/grad_rows.cuh"

namespace frd {

constexpr int kGradTile = 64,
              kGradDepth = 32;  // output channels by input channels of a block; rows of a step

// Rows [B * count, C], those of one item behind another: gradients in the workspace, and what they multiply.
template <class T>
class WeightRows {
  using A = compute_t<T>;

 public:
  __device__ WeightRows(const IcmGradArgs& args, int round, bool of_value)
      : a_(args),
        t_(round),
        count_(args.round[round].centres() + (of_value ? 0 : args.round[round].tokens())),
        tokens_(of_value ? 0 : args.round[round].tokens()),
        grads_(of_value ? args.work[round].result_grad : args.work[round].key_grad),
        centres_(of_value ? args.round[round].saved.mean : args.round[round].saved.pooled) {}

  __device__ int total() const { return static_cast<int>(a_.batch) * count_; }

  // Of a row: its gradients at the channels `out` and `out` + 32, and what it is at `in` and `in` + 32.
  __device__ void fetch(int row, int out, int in, A (&grad)[2][kRun], A (&token)[2][kRun]) const {
    const int item = row / count_, i = row - item * count_, channels = a_.channels;
    const A* work = static_cast<const A*>(a_.workspace) + item * a_.workspace_stride;
    const A* saved = static_cast<const A*>(a_.saved) + item * a_.saved_stride;
    const A* grads = work + grads_ + int64_t{i} * channels;
    TokenRows<T> rows{{}, saved + centres_, channels};
    if (i < tokens_ && t_ > 0)
      rows.own = saved + a_.round[t_ - 1].saved.result;
    else if (i < tokens_ && a_.copies_keys)
      rows = {{reinterpret_cast<T*>(const_cast<A*>(work) + a_.keys_copy), channels, 1}, nullptr, channels};
    else if (i < tokens_)
      rows = TokenRows<T>::of(a_.keys, item, channels);
    FRD_UNROLL
    for (int h = 0; h < 2; ++h) {
      load_run(grads + out + 32 * h, channels - out - 32 * h, grad[h]);
      rows.run(i < tokens_ ? i : i - tokens_, in + 32 * h, token[h]);
    }
  }

 private:
  const IcmGradArgs& a_;
  int t_, count_, tokens_;  // of the rows of an item so many are tokens, the others centres
  int64_t grads_, centres_;
};

// A step's elements on their way into shared memory: a thread has two runs of one row of either side.
template <class T>
class WeightStep {
  using A = compute_t<T>;

 public:
  __device__ void fetch(const WeightRows<T>& rows, int first, int end, int out, int in) {
    const int row = first + row_of(), column = column_of();
    if (row < end) {
      rows.fetch(row, out + column, in + column, grad_, token_);
      return;
    }
    FRD_UNROLL
    for (int h = 0; h < 2; ++h) FRD_UNROLL
    for (int e = 0; e < kRun; ++e) grad_[h][e] = token_[h][e] = A(0);
  }
  // grad(row, column, run) for the runs of the gradients, token(...) for the others
  template <class Grad, class Token>
  __device__ void put(const Grad& grad, const Token& token) const {
    FRD_UNROLL
    for (int h = 0; h < 2; ++h) {
      grad(row_of(), column_of() + 32 * h, grad_[h]);
      token(row_of(), column_of() + 32 * h, token_[h]);
    }
  }

 private:
  static __device__ int row_of() { return static_cast<int>(threadIdx.x) / 8; }
  static __device__ int column_of() { return static_cast<int>(threadIdx.x) % 8 * kRun; }
  A grad_[2][kRun], token_[2][kRun];
};

// Sums by multiply-adds; a thread has rows 4 * (threadIdx.x / 16) on and as many columns.
template <class T, bool kHalf = sizeof(T) == 2>
class WeightSums {
  using A = compute_t<T>;
  static constexpr int kPitch = kGradTile + 4, kTokens = kGradDepth * kPitch;

 public:
  static constexpr int kSharedBytes = 2 * kGradDepth * kPitch * static_cast<int>(sizeof(A));

  __device__ static void put(const WeightStep<T>& step, void* shared) {
    const auto to = [](A* tile) {
      return
          [=](int row, int column, const A(&v)[kRun]) { store_run(tile + row * kPitch + column, kRun, v); };
    };
    step.put(to(static_cast<A*>(shared)), to(static_cast<A*>(shared) + kTokens));
  }
  // row_sums: whether to add up the gradients by themselves
  __device__ void add(const void* shared, bool row_sums) {
    const A *left = static_cast<const A*>(shared), *right = left + kTokens;
    if (row_sums && threadIdx.x < kGradTile)
      for (int k = 0; k < kGradDepth; ++k) row_sum_ += left[k * kPitch + threadIdx.x];
#pragma unroll 4
    for (int k = 0; k < kGradDepth; ++k) {
      A a[kRun], b[kRun];
      load_run(left + k * kPitch + threadIdx.x / 16 * 4, kRun, a);
      load_run(right + k * kPitch + threadIdx.x % 16 * 4, kRun, b);
      FRD_UNROLL
      for (int i = 0; i < 4; ++i) FRD_UNROLL
      for (int j = 0; j < 4; ++j) sum_[i][j] += a[i] * b[j];
    }
  }
  // f(row, column, sum)
  template <class F>
  __device__ void finish(const F& f) const {
    FRD_UNROLL
    for (int i = 0; i < 4; ++i) FRD_UNROLL
    for (int j = 0; j < 4; ++j) f(threadIdx.x / 16 * 4 + i, threadIdx.x % 16 * 4 + j, sum_[i][j]);
  }
  __device__ A row_sum() const { return row_sum_; }  // of row threadIdx.x, below kGradTile

 private:
  A sum_[4][4] = {};
  A row_sum_ = 0;
};

// Sums by tensor cores, of numbers split into two of bf16, which have the range of float: products are exact
// to 2^-16. A warp has 32 rows by 16 columns.
template <class T>
class WeightSums<T, true> {
  static constexpr int kPitch = kGradTile + 8;  // eight neighbouring rows in different banks
  static constexpr int kPart = kGradDepth * kPitch;

 public:
  static constexpr int kSharedBytes = 4 * kPart * static_cast<int>(sizeof(bf16));

  __device__ static void put(const WeightStep<T>& step, void* shared) {
    const auto to = [](bf16* high) {
      return [=](int row, int column, const float (&v)[kRun]) {
        uint2 parts[2];
        split(v[0], v[1], parts[0].x, parts[1].x);
        split(v[2], v[3], parts[0].y, parts[1].y);
        FRD_UNROLL
        for (int p = 0; p < 2; ++p)
          *reinterpret_cast<uint2*>(high + p * kPart + row * kPitch + column) = parts[p];
      };
    };
    step.put(to(static_cast<bf16*>(shared)), to(static_cast<bf16*>(shared) + 2 * kPart));
  }
  __device__ void add(const void* shared, bool row_sums) {
    const bf16* left = static_cast<const bf16*>(shared);
    if (row_sums && threadIdx.x < kGradTile)
      for (int k = 0; k < kGradDepth; ++k)
        row_sum_ += load(left[k * kPitch + threadIdx.x]) + load(left[kPart + k * kPitch + threadIdx.x]);
    const int lane = lane_of_warp(), in_matrix = lane % 8, low = lane / 8 % 2, high = lane / 16;
    const bf16* rows = left + (high * 8 + in_matrix) * kPitch + first_row() + low * 8;
    const bf16* columns = left + 2 * kPart + (low * 8 + in_matrix) * kPitch + first_column() + high * 8;
    FRD_UNROLL
    for (int k = 0; k < kGradDepth; k += 16) {
      uint32_t a[2][2][4], b[2][4];
      FRD_UNROLL
      for (int p = 0; p < 2; ++p) {
        FRD_UNROLL
        for (int i = 0; i < 2; ++i) ldmatrix<4, true>(a[p][i], rows + p * kPart + k * kPitch + i * 16);
        ldmatrix<4, true>(b[p], columns + p * kPart + k * kPitch);
      }
      FRD_UNROLL
      for (int i = 0; i < 2; ++i) FRD_UNROLL
      for (int j = 0; j < 2; ++j) {
        mma_m16n8k16<bf16>(sum_[i][j], a[1][i], b[0][2 * j], b[0][2 * j + 1]);
        mma_m16n8k16<bf16>(sum_[i][j], a[0][i], b[1][2 * j], b[1][2 * j + 1]);
        mma_m16n8k16<bf16>(sum_[i][j], a[0][i], b[0][2 * j], b[0][2 * j + 1]);
      }
    }
  }
  template <class F>
  __device__ void finish(const F& f) const {
    const int row = first_row() + lane_of_warp() / 4, column = first_column() + lane_of_warp() % 4 * 2;
    FRD_UNROLL
    for (int i = 0; i < 2; ++i) FRD_UNROLL
    for (int j = 0; j < 2; ++j) FRD_UNROLL
    for (int e = 0; e < 4; ++e) f(row + i * 16 + e / 2 * 8, column + j * 8 + e % 2, sum_[i][j][e]);
  }
  __device__ float row_sum() const { return row_sum_; }

 private:
  static __device__ int first_row() { return warp_of_block() / 4 * 32; }
  static __device__ int first_column() { return warp_of_block() % 4 * 16; }
  // What is left of an infinity is nothing, not NaN.
  static __device__ float rest(float v, float high) {
    return high - high == 0 || high != high ? v - high : 0.f;
  }
  static __device__ void split(float v, float w, uint32_t& high, uint32_t& low) {
    float v_high, w_high;
    high = pack<bf16>(v, w);
    unpack<bf16>(high, v_high, w_high);
    low = pack<bf16>(rest(v, v_high), rest(w, w_high));
  }

  float sum_[2][2][4] = {};
  float row_sum_ = 0;
};

// Part blockIdx.x of the sums, tile (blockIdx.y, blockIdx.z).
template <class T>
__global__ void __launch_bounds__(kTeamThreads, 2) weight_grad_kernel(const __grid_constant__ IcmGradArgs a) {
  using A = compute_t<T>;
  FRD_DYNAMIC_SHARED(double2, shared);  // aligned for vectors
  const int part = static_cast<int>(blockIdx.x);
  int job = 0;
  while (part >= a.first_part[job + 1]) ++job;
  const WeightRows<T> rows(a, job / 2, job % 2 != 0);
  const int out = static_cast<int>(blockIdx.y) * kGradTile, in = static_cast<int>(blockIdx.z) * kGradTile;
  const int begin = (part - a.first_part[job]) * kPartRows,
            end = begin + kPartRows < rows.total() ? begin + kPartRows : rows.total();
  WeightStep<T> step;
  WeightSums<T> sums;
  step.fetch(rows, begin, end, out, in);
#pragma unroll 1
  for (int first = begin; first < end; first += kGradDepth) {
    __syncthreads();
    WeightSums<T>::put(step, shared);
    __syncthreads();
    step.fetch(rows, first + kGradDepth, end, out, in);
    sums.add(shared, in == 0);
  }
  A* to = static_cast<A*>(a.weight_parts) + int64_t{part} * (a.channels + 1) * a.channels;
  sums.finish([&](int row, int column, A sum) {
    if (out + row < a.channels && in + column < a.channels)
      to[int64_t{out + row} * a.channels + in + column] = sum;
  });
  if (in == 0 && threadIdx.x < kGradTile && out + static_cast<int>(threadIdx.x) < a.channels)
    to[int64_t{a.channels} * a.channels + out + threadIdx.x] = sums.row_sum();
}

// The gradients of the gates: their parts in a fixed order.
template <class A>
FRD_DEVICE void reduce_gates(const IcmGradArgs& a, double* shared) {
  const int64_t parts = a.weighted || a.dense ? a.batch * a.team : 0;
#pragma unroll 1
  for (int which = 0; which < 2 * a.gates; ++which) {
    double sum = 0;
    for (int64_t p = threadIdx.x; p < parts; p += kTeamThreads) {
      const int64_t item = p / a.team, rank = p - item * a.team;
      sum += a.gate_parts[((item * a.gates + which / 2) * kGradBlocks + rank) * 2 + which % 2];
    }
    sum = warp_sum(sum);
    if (lane_of_warp() == 0) shared[warp_of_block()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      sum = 0;
      for (int w = 0; w < kTeamWarps; ++w) sum += shared[w];
      static_cast<A*>(which % 2 == 0 ? a.alpha_grad : a.beta_grad)[which / 2] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

// The gradients of the projections: of round blockIdx.y / 2, of its Wk and bk or its Wv and bv; behind them
// those of the gates.
template <class T>
__global__ void __launch_bounds__(kTeamThreads) grad_reduce_kernel(const __grid_constant__ IcmGradArgs a) {
  using A = compute_t<T>;
  FRD_DYNAMIC_SHARED(double2, shared);  // the kernels of a file share its type
  const int job = static_cast<int>(blockIdx.y);
  if (job == 2 * a.count) {
    if (blockIdx.x == 0) reduce_gates<A>(a, reinterpret_cast<double*>(shared));
    return;
  }
  const RoundGradOut& out = a.projection_grad[job / 2];
  T* weight = static_cast<T*>(job % 2 == 0 ? out.key_weight : out.value_weight);
  T* bias = static_cast<T*>(job % 2 == 0 ? out.key_bias : out.value_bias);
  const int64_t weights = int64_t{a.channels} * a.channels, size = weights + a.channels;
  const int64_t i = int64_t{blockIdx.x} * kTeamThreads + threadIdx.x;
  if (weight == nullptr || i >= size) return;
  const A* parts = static_cast<const A*>(a.weight_parts) + i;
  A sum = 0;
#pragma unroll 8
  for (int part = a.first_part[job]; part < a.first_part[job + 1]; ++part) sum += parts[part * size];
  store(i < weights ? weight[i] : bias[i - weights], sum);
}

}  // namespace frd
