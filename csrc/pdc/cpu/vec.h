// Whole and partial vectors of the compute type, loaded from and stored to any element type.
#pragma once
#include "core/dtypes.h"
#include "core/vec.h"
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own AVX-512 intrinsics
#endif

namespace frd {
namespace FRD_ISA {
namespace {

#define FRD_LAMBDA_INLINE __attribute__((always_inline))

template <class A>
using vec_t = typename Vec<A>::type;

template <class A>
FRD_INLINE vec_t<A> splat(A v) {
  return vec_t<A>{} + v;
}

// A whole vector.
template <class T>
FRD_INLINE vec_t<compute_t<T>> load_vec(const T* p) {
  return Vec<compute_t<T>>::load(p);
}
template <class T>
FRD_INLINE void store_vec(T* p, vec_t<compute_t<T>> v) {
  Vec<compute_t<T>>::store(p, v);
}

// The first n lanes; the others load as 0 and are not touched by a store. n < lanes.
// v in its first n lanes, 0 in the others.
template <class A>
FRD_INLINE vec_t<A> first_lanes(vec_t<A> v, int64_t n) {
  vec_t<A> lane;
  for (int i = 0; i < Vec<A>::lanes; ++i) lane[i] = static_cast<A>(i);
  return lane < splat(static_cast<A>(n)) ? v : vec_t<A>{};
}

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
