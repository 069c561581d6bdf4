// Vectors of the instruction set that a kernel file is compiled for. For *kernel.cpp only: everything here
// has internal linkage, so that no build's code can stand in for another's.
#pragma once
#include <cstdint>

#include "dtypes.h"
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
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

  FRD_INLINE void store(bf16* p, type v) {  // as store() of dtypes.h: round to nearest even, NaN stays NaN
    typedef uint16_t half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
    typedef uint32_t word __attribute__((vector_size(kVecBytes)));
    const word bits = reinterpret_cast<word>(v);
    const word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const word nan = reinterpret_cast<word>(v != v);
    *reinterpret_cast<half*>(p) = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), half);
  }

  FRD_INLINE type load(const f16* p) {
#if defined(__AVX512F__)  // the masked forms: GCC 12 warns inside the plain ones
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

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
