// Vectors of the instruction set that a kernel file is compiled for. Only for *kernel.cpp: everything here
// has internal linkage, so that the linker cannot use one instruction set's code for another.
#pragma once
#include <cstdint>

#include "dtypes.h"
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns inside its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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

#define FRD_INLINE static inline __attribute__((always_inline))

// A = float or double, the type a kernel computes in; 16-bit loads and stores are for A = float.
template <class A>
struct Vec {
  static constexpr int lanes = kVecBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVecBytes)));
  typedef A unaligned __attribute__((vector_size(kVecBytes), aligned(alignof(A)), may_alias));

  FRD_INLINE type load(const A* p) { return *reinterpret_cast<const unaligned*>(p); }
  FRD_INLINE void store(A* p, type v) { *reinterpret_cast<unaligned*>(p) = v; }

  FRD_INLINE type load(const bf16* p) {
    typedef uint16_t half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
    typedef uint32_t word __attribute__((vector_size(kVecBytes)));
    return reinterpret_cast<type>(__builtin_convertvector(*reinterpret_cast<const half*>(p), word) << 16);
  }

  // Rounds to nearest even and keeps NaN, like store() of dtypes.h.
  FRD_INLINE void store(bf16* p, type v) {
    typedef uint16_t half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
    typedef uint32_t word __attribute__((vector_size(kVecBytes)));
    const word bits = reinterpret_cast<word>(v);
    const word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const word nan = reinterpret_cast<word>(v != v);
    *reinterpret_cast<half*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), half);
  }

  FRD_INLINE type load(const f16* p) {
#if defined(__AVX512F__)
    // The masked intrinsics, as GCC 12 warns inside the plain ones.
    return reinterpret_cast<type>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<type>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    type v;
    for (int i = 0; i < lanes; ++i) v[i] = frd::load(p[i]);
    return v;
#endif
  }

  FRD_INLINE void store(f16* p, type v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(p),
        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes; ++i) frd::store(p[i], v[i]);
#endif
  }
};

#define FRD_LAMBDA_INLINE __attribute__((always_inline))

template <class A>
using vec_t = typename Vec<A>::type;

template <class A>
FRD_INLINE vec_t<A> splat(A v) {
  return vec_t<A>{} + v;
}

// A whole vector, converted from or to the element type.
template <class T>
FRD_INLINE vec_t<compute_t<T>> load_vec(const T* p) {
  return Vec<compute_t<T>>::load(p);
}
template <class T>
FRD_INLINE void store_vec(T* p, vec_t<compute_t<T>> v) {
  Vec<compute_t<T>>::store(p, v);
}

// v in its first n lanes, 0 in the others. n < lanes.
template <class A>
FRD_INLINE vec_t<A> first_lanes(vec_t<A> v, int64_t n) {
  vec_t<A> lane;
  for (int i = 0; i < Vec<A>::lanes; ++i) lane[i] = static_cast<A>(i);
  return lane < splat(static_cast<A>(n)) ? v : vec_t<A>{};
}

// The first n elements: the other lanes load as 0 and are not stored. n < lanes.
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

// The first n elements, or if full a whole vector.
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

// Sum of the lanes, halving the vector at each step.
FRD_INLINE float sum_lanes(vec_t<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float part[Vec<float>::lanes];
  store_vec(part, v);
  for (int half = Vec<float>::lanes / 2; half > 0; half /= 2)
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
