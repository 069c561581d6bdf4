// Gradients of the projections: sums over the rows of the whole batch, in parts of kPartRows rows that a
// second kernel adds in their order, and with them the gates' parts.
#pragma once
#include "icm/team_grad_rows.cuh"

namespace frd {

constexpr int kGradTile = 64,
              kGradDepth = 32;  // output channels by input channels of a block; rows of a step

// Rows [B * count, C], those of one item behind another: gradients in the workspace, and what they multiply.
template <class T>
struct WeightRows {
  using A = compute_t<T>;
  const IcmGradArgs& a;
  int t, count, tokens;  // of the rows of an item so many are tokens, the others centres
  bool value;

  __device__ WeightRows(const IcmGradArgs& args, int round, bool of_value)
      : a(args),
        t(round),
        count(args.round[round].centres() + (of_value ? 0 : args.round[round].tokens())),
        tokens(of_value ? 0 : args.round[round].tokens()),
        value(of_value) {}

  __device__ int total() const { return static_cast<int>(a.batch) * count; }

  // The run of a row's gradient, and of the row, at channel c; zeros beyond the batch.
  __device__ void grad(int row, int c, A (&v)[kRun]) const {
    const int item = row / count, i = row - item * count;
    const A* rows = static_cast<const A*>(a.workspace) + item * a.workspace_stride +
                    (value ? a.work[t].result_grad : a.work[t].key_grad);
    load_run(rows + int64_t{i} * a.channels + c, item < a.batch ? a.channels - c : 0, v);
  }
  __device__ void token(int row, int c, A (&v)[kRun]) const {
    const int item = row / count, i = row - item * count;
    const A* saved = static_cast<const A*>(a.saved) + item * a.saved_stride;
    if (i < tokens && t == 0 && item < a.batch) {
      TokenRows<T>::of(a.values, item, a.channels).run(i, c, v);
      return;
    }
    const SavedRound& s = a.round[t].saved;
    const A* rows = i < tokens ? saved + a.round[t > 0 ? t - 1 : 0].saved.result + int64_t{i} * a.channels
                               : saved + (value ? s.mean : s.pooled) + int64_t{i - tokens} * a.channels;
    load_run(rows + c, item < a.batch ? a.channels - c : 0, v);
  }
};

// A step's elements on their way into shared memory: a thread has two runs of one row of either side, of
// neighbouring lanes' rows where neighbouring tokens are neighbours in memory.
template <class T>
class WeightStep {
  using A = compute_t<T>;

 public:
  __device__ explicit WeightStep(bool across) {
    row_ = across ? lane_of_warp() : static_cast<int>(threadIdx.x) / 8;
    column_ = (across ? warp_of_block() : static_cast<int>(threadIdx.x) % 8) * kRun;
  }
  __device__ void fetch(const WeightRows<T>& rows, int first, int end, int out, int in) {
    FRD_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = first + row_, c = column_ + 32 * h;
      if (row < end) {
        rows.grad(row, out + c, grad_[h]);
        rows.token(row, in + c, token_[h]);
      } else {
        FRD_UNROLL
        for (int e = 0; e < kRun; ++e) grad_[h][e] = token_[h][e] = A(0);
      }
    }
  }
  // put(row, column, run) for the runs of the gradients, and of the rows
  template <class Grad, class Token>
  __device__ void put(const Grad& grad, const Token& token) const {
    FRD_UNROLL
    for (int h = 0; h < 2; ++h)
      grad(row_, column_ + 32 * h, grad_[h]), token(row_, column_ + 32 * h, token_[h]);
  }

 private:
  int row_, column_;
  A grad_[2][kRun], token_[2][kRun];
};

// Sums by multiply-adds; a thread has rows 4 * (threadIdx.x / 16) on and as many columns.
template <class T>
struct WeightSums {
  using A = compute_t<T>;
  static constexpr int kPitch = kGradTile + 4;
  static constexpr int kSharedBytes = 2 * kGradDepth * kPitch * static_cast<int>(sizeof(A));
  A sum[4][4] = {};
  A bias = 0;

  __device__ static A* grads(void* shared) { return static_cast<A*>(shared); }
  __device__ static A* tokens(void* shared) { return static_cast<A*>(shared) + kGradDepth * kPitch; }

  __device__ static void put(const WeightStep<T>& step, void* shared) {
    const auto to = [](A* tile) {
      return
          [=](int row, int column, const A(&v)[kRun]) { store_run(tile + row * kPitch + column, kRun, v); };
    };
    step.put(to(grads(shared)), to(tokens(shared)));
  }
  __device__ void add(const void* shared, bool with_bias) {
    const A* left = static_cast<const A*>(shared);
    const A* right = left + kGradDepth * kPitch;
    if (with_bias && threadIdx.x < kGradTile)
      for (int k = 0; k < kGradDepth; ++k) bias += left[k * kPitch + threadIdx.x];
#pragma unroll 4
    for (int k = 0; k < kGradDepth; ++k) {
      A a[kRun], b[kRun];
      load_run(left + k * kPitch + threadIdx.x / 16 * 4, kRun, a);
      load_run(right + k * kPitch + threadIdx.x % 16 * 4, kRun, b);
      FRD_UNROLL
      for (int i = 0; i < 4; ++i) FRD_UNROLL
      for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
    }
  }
  // f(row, column, sum)
  template <class F>
  __device__ void finish(const F& f) const {
    FRD_UNROLL
    for (int i = 0; i < 4; ++i) FRD_UNROLL
    for (int j = 0; j < 4; ++j) f(threadIdx.x / 16 * 4 + i, threadIdx.x % 16 * 4 + j, sum[i][j]);
  }
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
  WeightStep<T> step(job == 0 && a.values.channel != 1);
  WeightSums<T> sums;
  step.fetch(rows, begin, end, out, in);
#pragma unroll 1
  for (int first = begin; first < end; first += kGradDepth) {
    __syncthreads();
    sums.put(step, shared);
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
    to[int64_t{a.channels} * a.channels + out + threadIdx.x] = sums.bias;
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
