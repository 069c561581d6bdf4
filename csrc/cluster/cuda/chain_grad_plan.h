// The backward of the chain from its arguments: memory, products and launches in order. No torch here.
//
// Where the forward composes the projections, the backward takes them one after the other. With y_0 = mean,
// y_t = y_(t-1) Wv_t^T + bv_t and g_T = dZ_(T+1):
//   dWk_t = dZ_t^T y_(t-1), dWv_t = g_t^T y_(t-1), g_(t-1) = dZ_t Wk_t + g_t Wv_t; d mean = g_1 Wv_1
// In the code rounds count from 0, as in `round`.
#pragma once
#include <algorithm>

#include "cluster/cuda/chain_grad.h"
#include "cluster/cuda/chain_plan.h"

namespace frd {
namespace chain {

// Results; the projections' are null where a round has none.
struct Gradients {
  TokenView keys, values;  // [B, N, C] of k and v; icm: of x, and null
  struct Projection {
    void *key_weight, *key_bias, *value_weight, *value_bias;
  } projection[kMaxRounds];
  float *alpha, *beta;  // [1], released [T]
};

class Backward {
 public:
  // args: without chunks and workspace; icm: `keys` without meaning if round 1 is projected
  Backward(const GradArgs& args, const Gradients& gradients, bool icm)
      : a(args), to(gradients), icm_(icm), count_(args.count) {
    const int tiles = (a.tokens() + kTileTokens - 1) / kTileTokens;
    const int64_t part = int64_t{a.last()} * (2 * a.channels + a.centres()), room = int64_t{1} << 20;
    const int most = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(32, room / part)));
    const int each = (tiles + most - 1) / most;
    a.chunk_tokens = each * kTileTokens, a.chunks = (tiles + each - 1) / each;
  }

  // Floats of the workspace.
  int64_t size() {
    place(nullptr);
    return used_;
  }
  // memory: size() floats, aligned to 16 bytes
  cudaError_t run(float* memory, cudaStream_t stream) {
    place(memory);
    if (a.batch > 0)
      if (const cudaError_t error = icm_ ? run_icm(stream) : run_cluster(stream)) return error;
    return sum_grads(sums_, stream);
  }

 private:
  static constexpr int kTileTokens = 32, kDepthOfPart = 256, kMaxParts = 16;

  bool projected(int t) const { return a.round[t].key_weight != nullptr; }
  DType dtype() const { return a.values.dtype; }
  int64_t rows() const { return int64_t{a.batch} * a.centres(); }
  static int64_t parts_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += (floats + 3) / 4 * 4;
    return memory_ ? memory_ + at : nullptr;
  }

  // The workspace at `memory`, and what the last products and sums are.
  void place(float* memory) {
    memory_ = memory, used_ = 0;
    sums_.count = weight_sums_ = 0;
    const int64_t batch = a.batch, tokens = a.tokens(), centres = a.centres(), channels = a.channels;
    const int64_t parts = batch * a.chunks, last = a.last();
    a.pooled_grad = take(batch * centres * channels);
    a.bin_share = take(batch * centres);
    a.gate_parts = take((icm_ && !a.dense ? count_ : 1) * parts * 2);
    if (a.dense) {
      a.score_grad = take(batch * tokens * last);
      a.radial = take(batch * tokens);
      a.unit_parts = take(parts * last * channels);
      a.product_parts = take(parts * centres * last);
      a.query = take(batch * last * channels);
    } else {
      a.cosine_grad = take(batch * tokens);
    }
    add_gate_sums();
    if (icm_) place_icm();
  }

  void place_icm() {
    const int64_t parts = int64_t{a.batch} * a.chunks, channels = a.channels;
    if (!a.dense) a.chain_parts = take(parts * a.centres());
    a.last_parts = take(parts * a.last() * channels);
    a.late_stride = (late_grad_size(a) + 3) / 4 * 4;
    a.late = take(a.batch * a.late_stride);
    a.rows_grad_row = (2 * int64_t{count_} - 1) * channels;
    a.rows_grad = take(rows() * a.rows_grad_row);
    a.mean_grad = projected(0) ? take(rows() * channels) : of_values(0);
    a.mean_grad_row = projected(0) ? channels : a.rows_grad_row;
    for (int t = 1; t < count_; ++t) {
      values_[t] = values_[t - 1];
      if (projected(t - 1)) values_[t] = take(rows() * channels);
    }
    a.keys = a.values;
    if (projected(0)) {
      const int64_t size = int64_t{a.batch} * a.tokens() * channels;
      token_rows_ = take(size), means_part_ = take(size);
      a.keys = dense_tokens(token_rows_);
    }
    key_sums_ = projected(0) ? take(int64_t{a.batch} * token_runs(a) * channels) : nullptr;
    row_sums_ = take(parts_of(rows(), kSumRows) * a.rows_grad_row);
    for (int t = 0; t < count_; ++t)
      if (projected(t)) add_projection_sums(t);
  }

  TokenView dense_tokens(float* data) const {
    return {data, DType::f32, int64_t{a.tokens()} * a.channels, a.channels, 1};
  }

  // Columns [B O_1, C] of rows_grad: the gradient of the keys of round t > 0; of the values behind round t.
  float* of_keys(int t) const { return column_block(t - 1); }
  float* of_values(int t) const { return column_block(t + 1 == count_ ? t : count_ + t); }
  float* column_block(int i) const { return a.rows_grad ? a.rows_grad + int64_t{i} * a.channels : nullptr; }
  Matrix rows_matrix(const float* block) const {
    return {const_cast<float*>(block), DType::f32, a.centres() * a.rows_grad_row, a.rows_grad_row, 1};
  }
  // [B, O_1, C] the values before round t.
  Matrix values_before(int t) const {
    const bool mean = t == 0 || values_[t] == nullptr;
    Matrix m = dense_matrix(mean ? a.saved + a.layout.mean : values_[t], DType::f32, a.centres(), a.channels);
    if (mean) m.item = a.layout.size;
    return m;
  }
  Matrix weight_matrix(const void* weight) const {
    return shared_by_items(dense_matrix(weight, dtype(), a.channels, a.channels));
  }
  static Matrix matrix_of(const TokenView& v) { return {v.data, v.dtype, v.batch, v.token, v.channel}; }

  void add_sum(const void* from, int64_t parts, int64_t size, int64_t stride, void* grad, DType grad_dtype) {
    sums_.sum[sums_.count++] = {static_cast<const float*>(from),
                                a.batch > 0 ? static_cast<int>(parts) : 0,
                                static_cast<int>(size),
                                stride,
                                grad,
                                grad_dtype};
  }
  void add_gate_sums() {
    const int64_t parts = int64_t{a.batch} * a.chunks;
    const int gates = icm_ && !a.dense ? count_ : 1;
    for (int t = 0; t < gates; ++t) {
      const int64_t filled = !a.dense && !a.weighted ? 0 : t == 0 ? parts : a.batch;
      const float* from = a.gate_parts ? a.gate_parts + t * parts * 2 : nullptr;
      add_sum(from, filled, 1, 2, to.alpha + t, DType::f32);
      add_sum(from ? from + 1 : nullptr, filled, 1, 2, to.beta + t, DType::f32);
    }
  }
  void add_projection_sums(int t) {
    const Gradients::Projection& p = to.projection[t];
    const int64_t row_parts = parts_of(rows(), kSumRows);
    const auto add_bias = [&](const float* block, void* grad) {
      const float* from = row_sums_ ? row_sums_ + (block - a.rows_grad) : nullptr;
      add_sum(from, row_parts, a.channels, a.rows_grad_row, grad, dtype());
    };
    add_weight_sum(rows_matrix(of_values(t)), values_before(t), a.centres(), p.value_weight);
    add_bias(of_values(t), p.value_bias);
    if (t > 0) {
      add_weight_sum(rows_matrix(of_keys(t)), values_before(t), a.centres(), p.key_weight);
      add_bias(of_keys(t), p.key_bias);
    } else {
      add_weight_sum(matrix_of(dense_tokens(token_rows_)), matrix_of(a.values), a.tokens(), p.key_weight);
      add_sum(key_sums_, int64_t{a.batch} * token_runs(a), a.channels, a.channels, p.key_bias, dtype());
    }
  }
  // grad [C, C] = sum over items of left^T right, both [B, depth, C]
  void add_weight_sum(const Matrix& left, const Matrix& right, int64_t depth, void* grad) {
    const int channels = a.channels;
    Product p{};
    p.items = a.batch, p.rows = p.columns = channels;
    if (left.item == depth * left.row && right.item == depth * right.row) p.items = 1, depth *= a.batch;
    p.depth = static_cast<int>(depth);
    p.left = transposed(left), p.right = right, p.right_early = true;
    p.sum_items = true;
    p.parts =
        static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kMaxParts, depth * p.items / kDepthOfPart)));
    float* sums = take(int64_t{p.parts} * channels * channels);
    p.to = dense_matrix(sums, DType::f32, channels, channels);
    weight_sum_[weight_sums_++] = p;
    add_sum(sums, p.parts, p.to.item, p.to.item, grad, dtype());
  }

  cudaError_t run_products(Products& products, cudaStream_t stream) const {
    products.float_parts = float_parts(dtype());
    return products.count > 0 ? chain::run_products(products, stream) : cudaSuccess;
  }
  // The values behind round t, if they are not those before it.
  void add_values(int t, Products& products) const {
    if (t + 1 >= count_ || !projected(t)) return;
    products.product[products.count++] = apply(value_map(a.round[t], dtype()), a.batch, a.centres(),
                                               a.channels, values_before(t), values_before(t + 1));
  }

  cudaError_t run_first_products(cudaStream_t stream) const {
    Products products{};
    if (projected(0))
      products.product[products.count++] = apply(key_map(a.round[0], dtype()), a.batch, a.tokens(),
                                                 a.channels, matrix_of(a.values), matrix_of(a.keys));
    add_values(0, products);
    for (Product& p : products.product)
      p.right_early = false;  // a kernel before the chain may still write it
    return run_products(products, stream);
  }
  // g before round t > 0 = dZ_t Wk + g Wv, two matrices as items of a sum; beside it the next values.
  cudaError_t run_round_products(int t, cudaStream_t stream) const {
    Products products{};
    add_values(count_ - t, products);
    if (!projected(t)) {
      if (const cudaError_t error = run_products(products, stream)) return error;
      return add_rows(a, of_keys(t), of_values(t), of_values(t - 1), stream);
    }
    const Round& r = a.round[t];
    Product p{};
    p.items = 2, p.rows = static_cast<int>(rows()), p.columns = p.depth = a.channels;
    p.left = rows_matrix(of_keys(t)), p.left.item = of_values(t) - of_keys(t);
    p.right = weight_matrix(r.key_weight), p.right_early = true;
    p.right.item = elements_between(r.key_weight, r.value_weight);
    p.to = rows_matrix(of_values(t - 1));
    p.sum_items = true;
    products.product[products.count++] = p;
    return run_products(products, stream);
  }
  int64_t elements_between(const void* from, const void* other) const {
    const int64_t bytes = reinterpret_cast<intptr_t>(other) - reinterpret_cast<intptr_t>(from);
    return bytes / (dtype() == DType::f32 ? 4 : 2);
  }
  cudaError_t run_mean_product(cudaStream_t stream) const {
    if (!projected(0)) return cudaSuccess;
    Products products{};
    Product& p = products.product[products.count++];
    p.items = a.batch, p.rows = a.centres(), p.columns = p.depth = a.channels;
    p.left = rows_matrix(of_values(0));
    p.right = weight_matrix(a.round[0].value_weight), p.right_early = true;
    p.to = dense_matrix(a.mean_grad, DType::f32, a.centres(), a.channels);
    return run_products(products, stream);
  }
  // dx = dK_1 Wk + the means' part, and the weights' sums
  cudaError_t run_last_products(cudaStream_t stream) const {
    Products products{};
    if (projected(0)) {
      Product& p = products.product[products.count++];
      p.items = a.batch, p.rows = a.tokens(), p.columns = p.depth = a.channels;
      p.left = matrix_of(dense_tokens(token_rows_)), p.add = matrix_of(dense_tokens(means_part_));
      p.right = weight_matrix(a.round[0].key_weight), p.right_early = true;
      p.to = matrix_of(to.keys);
    }
    for (int i = 0; i < weight_sums_; ++i) {
      products.product[products.count++] = weight_sum_[i];
      if (products.count < kMaxProducts) continue;
      if (const cudaError_t error = run_products(products, stream)) return error;
      products.count = 0;
    }
    return run_products(products, stream);
  }

  cudaError_t run_icm(cudaStream_t stream) const {
    if (const cudaError_t error = run_first_products(stream)) return error;
    if (const cudaError_t error = grad_tokens(a, stream)) return error;
    if (const cudaError_t error = grad_late(a, stream)) return error;
    for (int t = count_ - 1; t > 0; --t)
      if (const cudaError_t error = run_round_products(t, stream)) return error;
    if (const cudaError_t error = run_mean_product(stream)) return error;
    if (!a.dense)
      if (const cudaError_t error = run_own_cosines(stream)) return error;
    GradRows rows{};
    rows.keys = projected(0) ? dense_tokens(token_rows_) : to.keys;
    if (projected(0)) rows.values = dense_tokens(means_part_);
    rows.key_sums = key_sums_;
    if (weight_sums_ > 0) rows.row_sums = row_sums_;
    if (const cudaError_t error = grad_rows(a, rows, stream)) return error;
    return run_last_products(stream);
  }
  cudaError_t run_cluster(cudaStream_t stream) const {
    if (const cudaError_t error = run_own_cosines(stream)) return error;
    return grad_rows(a, {to.keys, to.values, nullptr, nullptr}, stream);
  }
  cudaError_t run_own_cosines(cudaStream_t stream) const {
    if (const cudaError_t error = grad_cosines(a, stream)) return error;
    return grad_centres(a, stream);
  }

  GradArgs a;
  Gradients to;
  bool icm_;
  int count_;
  float* memory_ = nullptr;
  int64_t used_ = 0;
  float* values_[kMaxRounds] = {};  // before each round, or null for the means of round 1
  float *token_rows_ = nullptr, *means_part_ = nullptr;  // [B, N, C] keys of round 1, then dK_1; means' part
  float *key_sums_ = nullptr, *row_sums_ = nullptr;      // of GradRows
  Product weight_sum_[2 * kMaxRounds];
  int weight_sums_ = 0;
  PartSums sums_{};
};

}  // namespace chain
}  // namespace frd
