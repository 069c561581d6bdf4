// Steps of a round on one tile of tokens. Included by *kernel.cpp only, once per instruction set.
#pragma once
#include "cluster/cpu/tiles.h"
#include "core/gemm.h"

namespace frd {
namespace FRD_ISA {
namespace {

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

// The inverse norm of row [n].
template <class A>
inline A inverse_norm(const A* row, int64_t n) {
  return frd::inverse_norm(square_root(dot(row, row, n)));
}

// Tokens begin .. end of a chunk.
struct Span {
  int64_t begin, end;
};
inline Span chunk_span(int64_t tokens, int64_t chunks, int64_t chunk) {
  int64_t step = (tokens + chunks - 1) / chunks;
  step = (step + kTile - 1) / kTile * kTile;
  const int64_t begin = chunk * step < tokens ? chunk * step : tokens;
  return {begin, begin + step < tokens ? begin + step : tokens};
}

// out [m, C] = rows [m, C] * weight^T + bias, with the weight's transpose packed.
template <class A>
inline void project(const A* rows, const A* packed, const A* bias, int64_t m, int64_t channels, A* out) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = bias[c];
  gemm_of(A()).run(rows, channels, packed, out, channels, m, channels, channels, true);
}

// Weight of a token in its cluster, from its cosine.
template <class A>
inline A token_weight(const Round<A>& r, A cosine) {
  return r.weighted ? sigmoid(r.beta + r.alpha * cosine) : A(1);
}

// Keys of the tokens first .. first + m of item b [m, C]; in `keys`, or where they already are.
template <class A>
inline const A* load_keys(const Round<A>& r, const A* tokens, int64_t b, int64_t first, int64_t m, A* keys) {
  if (r.key_packed != nullptr) {
    project(tokens, r.key_packed, r.key_bias, m, r.channels, keys);
    return keys;
  }
  return r.shared ? tokens : load_tile(r.keys, b, first, m, r.channels, keys);
}

// Eq. 4 and its gradient on one tile.
// product [m, J]: of the cosines of the tokens [m, C] of item b, 1 / key norm in scale [m].
template <class A>
inline void dense_product(const DenseDispatch<A>& d, int64_t b, const A* tokens, const A* scale, int64_t m,
                          int64_t channels, A* product) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.columns; ++j)
      product[i * d.columns + j] =
          scale[i] * (dot(tokens + i * channels, d.projected[b] + j * channels, channels) + d.offset[b][j]);
}

// From grad [m, C] of the output to that of the sigmoid's argument [m, J]; gate [m, J] is the sigmoid.
template <class A>
inline void dense_gate_grad(const DenseDispatch<A>& d, int64_t b, const A* product, const A* grad, int64_t m,
                            int64_t channels, A* gate, A* argument_grad) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.columns; ++j) {
      const int64_t at = i * d.columns + j;
      const A g = sigmoid(d.alpha * product[at] + d.beta);
      gate[at] = g;
      argument_grad[at] = dot(grad + i * channels, d.last[b] + j * channels, channels) * g * (A(1) - g);
    }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
