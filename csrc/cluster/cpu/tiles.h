// Tiles of tokens as rows [tokens, channels] of the compute type, whatever their strides and dtype in memory,
// and the steps of a round on a tile. Only for *kernel.cpp, which is compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "cluster/cpu/kernels.h"
#include "core/gemm.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Tokens of a tile.
constexpr int64_t kTile = 64;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Uninitialised memory for the duration of a call.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(std::aligned_alloc(64, (size * sizeof(A) + 63) / 64 * 64 + 64))) {
    // Nothing may be thrown inside a parallel loop.
    if (data_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

// A square of as many rows as a vector has lanes.
template <class A>
struct Square {
  static constexpr int side = kVectorBytes / sizeof(A);
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  typedef A Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
};

// The index type that __builtin_shuffle needs for elements of a size.
template <int bytes>
struct MaskOf {
  typedef int32_t type;
};
template <>
struct MaskOf<8> {
  typedef int64_t type;
};

// out [side, side] (row stride out_stride) = transpose of in [side, side] (row stride in_stride): log2(side)
// rounds that interleave row i with row i + side / 2.
template <class A>
inline void transpose_square(const A* in, int64_t in_stride, A* out, int64_t out_stride) {
  using S = Square<A>;
  typedef typename MaskOf<sizeof(A)>::type Index;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  constexpr int side = S::side;
  Mask low, high;
  for (int i = 0; i < side; ++i) {
    low[i] = i / 2 + (i % 2) * side;
    high[i] = side / 2 + i / 2 + (i % 2) * side;
  }
  typename S::Vector rows[side], next[side];
#pragma GCC unroll 16
  for (int i = 0; i < side; ++i)
    rows[i] = *reinterpret_cast<const typename S::Unaligned*>(in + i * in_stride);
#pragma GCC unroll 4
  for (int span = 1; span < side; span *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < side / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + side / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + side / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < side; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < side; ++i) *reinterpret_cast<typename S::Unaligned*>(out + i * out_stride) = rows[i];
}

// out [m, channels] = the tokens at `in`, whose element (i, c) is at in[i * token + c * channel].
template <class A, class T>
void gather_rows(const T* in, int64_t token, int64_t channel, int64_t m, int64_t channels, A* out) {
  constexpr int64_t side = Square<A>::side;
  if (channel == 1 || token != 1) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = load(in[i * token + c * channel]);
    return;
  }
  const int64_t whole_m = m - m % side;
  const int64_t whole_c = channels - channels % side;
  A block[side * side];
  for (int64_t i = 0; i < whole_m; i += side)
    for (int64_t c = 0; c < whole_c; c += side) {
      for (int64_t q = 0; q < side; ++q)
        for (int64_t p = 0; p < side; ++p) block[q * side + p] = load(in[i + p + (c + q) * channel]);
      transpose_square<A>(block, side, out + i * channels + c, channels);
    }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = i < whole_m ? whole_c : 0; c < channels; ++c)
      out[i * channels + c] = load(in[i + c * channel]);
}

// The reverse of gather_rows.
template <class A, class T>
void scatter_rows(const A* in, int64_t m, int64_t channels, T* out, int64_t token, int64_t channel) {
  constexpr int64_t side = Square<A>::side;
  if (channel == 1 || token != 1) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < channels; ++c) store(out[i * token + c * channel], in[i * channels + c]);
    return;
  }
  const int64_t whole_m = m - m % side;
  const int64_t whole_c = channels - channels % side;
  A block[side * side];
  for (int64_t i = 0; i < whole_m; i += side)
    for (int64_t c = 0; c < whole_c; c += side) {
      transpose_square<A>(in + i * channels + c, channels, block, side);
      for (int64_t q = 0; q < side; ++q)
        for (int64_t p = 0; p < side; ++p) store(out[i + p + (c + q) * channel], block[q * side + p]);
    }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = i < whole_m ? whole_c : 0; c < channels; ++c)
      store(out[i + c * channel], in[i * channels + c]);
}

// The dtype of A itself: contiguous rows of it need no copy.
template <class A>
constexpr DType kDTypeOf = sizeof(A) == 8 ? DType::f64 : DType::f32;

// Tokens first .. first + m of sample b [m, channels]: a pointer to them if they are contiguous in type A,
// else their copy in `buffer`.
template <class A>
const A* load_tile(const TokenView& view, int64_t b, int64_t first, int64_t m, int64_t channels, A* buffer) {
  const int64_t at = b * view.batch + first * view.token;
  if (view.dtype == kDTypeOf<A>) {
    const A* in = static_cast<const A*>(view.data) + at;
    if (view.channel == 1 && view.token == channels) return in;
    gather_rows<A, A>(in, view.token, view.channel, m, channels, buffer);
  } else if (view.dtype == DType::bf16) {
    gather_rows<A, bf16>(static_cast<const bf16*>(view.data) + at, view.token, view.channel, m, channels,
                         buffer);
  } else {
    gather_rows<A, f16>(static_cast<const f16*>(view.data) + at, view.token, view.channel, m, channels,
                        buffer);
  }
  return buffer;
}

// Stores rows [m, channels] as tokens first .. first + m of sample b.
template <class A>
void store_tile(const A* rows, const TokenView& view, int64_t b, int64_t first, int64_t m, int64_t channels) {
  const int64_t at = b * view.batch + first * view.token;
  if (view.dtype == kDTypeOf<A>)
    scatter_rows<A, A>(rows, m, channels, static_cast<A*>(view.data) + at, view.token, view.channel);
  else if (view.dtype == DType::bf16)
    scatter_rows<A, bf16>(rows, m, channels, static_cast<bf16*>(view.data) + at, view.token, view.channel);
  else
    scatter_rows<A, f16>(rows, m, channels, static_cast<f16*>(view.data) + at, view.token, view.channel);
}

// y += scale * x
template <class A>
inline void add_scaled(A scale, const A* x, int64_t n, A* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

template <class A>
inline A dot(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

template <class A>
inline void fill(A* x, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

inline const GemmOps<float>& gemm_of(float) { return gemm_kernels().f32; }
inline const GemmOps<double>& gemm_of(double) { return gemm_kernels().f64; }
inline float exponential(float v) { return __builtin_expf(v); }
inline double exponential(double v) { return __builtin_exp(v); }
inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }

template <class A>
inline A sigmoid(A v) {
  return A(1) / (A(1) + exponential(-v));
}

// 1 / max(|row|, kNormFloor) of row [n].
template <class A>
inline A inverse_norm(const A* row, int64_t n) {
  return frd::inverse_norm(square_root(dot(row, row, n)));
}

// Tokens [begin, end) of a chunk.
struct Span {
  int64_t begin, end;
};
inline Span chunk_span(int64_t tokens, int64_t chunks, int64_t chunk) {
  int64_t step = (tokens + chunks - 1) / chunks;
  step = (step + kTile - 1) / kTile * kTile;
  const int64_t begin = chunk * step < tokens ? chunk * step : tokens;
  return {begin, begin + step < tokens ? begin + step : tokens};
}

// out [m, C] = rows [m, C] weight^T + bias [C], with the transpose of the weight packed.
template <class A>
inline void project(const A* rows, const A* packed, const A* bias, int64_t m, int64_t channels, A* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = bias[c];
  gemm_of(A()).run(rows, channels, packed, out, channels, m, channels, channels, true);
}

// Weight of a token in its cluster: sigmoid(beta + alpha cosine), or 1.
template <class A>
inline A token_weight(const ClusterRound<A>& r, A cosine) {
  return r.weighted ? sigmoid(r.beta + r.alpha * cosine) : A(1);
}

// Keys [m, C] of the tokens first .. first + m of sample b: a pointer to `keys`, or to where they are
// already.
template <class A>
inline const A* load_keys(const ClusterRound<A>& r, const A* tokens, int64_t b, int64_t first, int64_t m,
                          A* keys) {
  if (r.key_packed != nullptr) {
    project(tokens, r.key_packed, r.key_bias, m, r.channels, keys);
    return keys;
  }
  return r.shared ? tokens : load_tile(r.keys, b, first, m, r.channels, keys);
}

// product [m, J] of the rounds' cosines = inv_norm (tokens projected^T + offset), for tokens [m, C] of sample
// b and inv_norm [m].
template <class A>
inline void dense_product(const DenseDispatch<A>& d, int64_t b, const A* tokens, const A* inv_norm, int64_t m,
                          int64_t channels, A* product) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.last_centres; ++j)
      product[i * d.last_centres + j] =
          inv_norm[i] *
          (dot(tokens + i * channels, d.projected[b] + j * channels, channels) + d.offset[b][j]);
}

// gate [m, J] = sigmoid(alpha product + beta), argument_grad [m, J] = (grad R^T) gate (1 - gate), for grad
// [m, C] of the output.
template <class A>
inline void dense_gate_grad(const DenseDispatch<A>& d, int64_t b, const A* product, const A* grad, int64_t m,
                            int64_t channels, A* gate, A* argument_grad) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.last_centres; ++j) {
      const int64_t at = i * d.last_centres + j;
      const A g = sigmoid(d.alpha * product[at] + d.beta);
      gate[at] = g;
      argument_grad[at] = dot(grad + i * channels, d.last[b] + j * channels, channels) * g * (A(1) - g);
    }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
