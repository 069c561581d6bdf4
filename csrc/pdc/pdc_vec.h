// Vectors of the compute type, loaded from and stored to any element type. Included inside FRD_ISA's
// anonymous namespace, so that each build has its own copy.
#pragma once
#include "core/dtypes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own AVX-512 intrinsics
#endif
#endif

namespace frd {
namespace FRD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

#define FRD_INLINE inline __attribute__((always_inline))
#define FRD_LAMBDA_INLINE __attribute__((always_inline))

template <class A>
struct Vec {
  static constexpr int lanes = kVecBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVecBytes)));
  typedef A unaligned __attribute__((vector_size(kVecBytes), aligned(alignof(A)), may_alias));
};
template <class A>
using vec_t = typename Vec<A>::type;

constexpr int kF32Lanes = Vec<float>::lanes;
typedef uint32_t U32 __attribute__((vector_size(kVecBytes)));
typedef int32_t I32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVecBytes / 2)));
typedef uint16_t U16Unaligned __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));

template <class A>
FRD_INLINE vec_t<A> splat(A v) {
  return vec_t<A>{} + v;
}

// A whole vector.
FRD_INLINE vec_t<float> load_vec(const float* p) {
  return *reinterpret_cast<const Vec<float>::unaligned*>(p);
}
FRD_INLINE vec_t<double> load_vec(const double* p) {
  return *reinterpret_cast<const Vec<double>::unaligned*>(p);
}
FRD_INLINE vec_t<float> load_vec(const bf16* p) {
  const U16 bits = *reinterpret_cast<const U16Unaligned*>(p);
  return reinterpret_cast<vec_t<float>>(__builtin_convertvector(bits, U32) << 16);
}
FRD_INLINE vec_t<float> load_vec(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec_t<float> v;
  for (int i = 0; i < kF32Lanes; ++i) v[i] = load(p[i]);
  return v;
#endif
}

FRD_INLINE void store_vec(float* p, vec_t<float> v) { *reinterpret_cast<Vec<float>::unaligned*>(p) = v; }
FRD_INLINE void store_vec(double* p, vec_t<double> v) { *reinterpret_cast<Vec<double>::unaligned*>(p) = v; }
FRD_INLINE void store_vec(bf16* p, vec_t<float> v) {
  const U32 u = reinterpret_cast<U32>(v);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const I32 nan = v != v;
  const U32 bits = nan ? U32{} + 0x7fc0u : rounded;
  *reinterpret_cast<U16Unaligned*>(p) = __builtin_convertvector(bits, U16);
}
FRD_INLINE void store_vec(f16* p, vec_t<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kF32Lanes; ++i) store(p[i], v[i]);
#endif
}

// The first n lanes; the others load as 0 and are not touched by a store. n < lanes.
template <class T>
FRD_INLINE vec_t<compute_t<T>> load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
  vec_t<compute_t<T>> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = load(p[i]);
  return v;
}
template <class T>
FRD_INLINE void store_part(T* p, vec_t<compute_t<T>> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#endif
  for (int64_t i = 0; i < n; ++i) store(p[i], v[i]);
}

template <bool full, class T>
FRD_INLINE vec_t<compute_t<T>> load_lanes(const T* p, int64_t n) {
  if constexpr (full) return load_vec(p);
  return load_part(p, n);
}
template <bool full, class T>
FRD_INLINE void store_lanes(T* p, vec_t<compute_t<T>> v, int64_t n) {
  if constexpr (full) return store_vec(p, v);
  store_part(p, v, n);
}

// Sum of the lanes, in halves.
FRD_INLINE float sum_lanes(vec_t<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float part[kF32Lanes];
  store_vec(part, v);
  for (int half = kF32Lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}
FRD_INLINE double sum_lanes(vec_t<double> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd(v);
#else
  double part[Vec<double>::lanes];
  store_vec(part, v);
  for (int half = Vec<double>::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
