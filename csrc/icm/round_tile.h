// Steps of a round on one tile of tokens. Included by *_kernel.cpp only, once per instruction set.
#pragma once
#include "core/gemm.h"
#include "icm/tiles.h"

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

// 1 / max(norm, kNormFloor); a NaN passes.
template <class A>
inline A inverse_norm(const A* row, int64_t n) {
  const A norm = square_root(dot(row, row, n));
  return norm <= A(kNormFloor) ? A(1) / A(kNormFloor) : A(1) / norm;
}

// Whether a row of this inverse norm has a direction that passes gradient.
template <class A>
inline bool is_live(A scale) {
  return !(scale >= A(1) / A(kNormFloor));
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

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
