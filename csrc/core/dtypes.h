// Element types of the kernels, without torch; 16-bit floats are stored as their bits.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FRD_HD __host__ __device__
#define FRD_UNROLL _Pragma("unroll")
#else
#define FRD_HD
#define FRD_UNROLL
#endif

namespace frd {

enum class DType : int { f32, f64, f16, bf16 };

using f32 = float;
using f64 = double;
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type a kernel computes in: double for double, else float.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

FRD_HD static inline float load(float v) { return v; }
FRD_HD static inline double load(double v) { return v; }
FRD_HD static inline float load(bf16 v) {
  uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FRD_HD static inline float load(f16 v) {
#if defined(__CUDACC__)
  return __half2float(__half(__half_raw{v.bits}));
#elif defined(__F16C__) || defined(__aarch64__)
  _Float16 h;
  memcpy(&h, &v.bits, 2);
  return static_cast<float>(h);
#else
  uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  uint32_t exponent = (v.bits >> 10) & 31u;
  uint32_t m = v.bits & 1023u;
  float f;
  // Zero or subnormal: m * 2^-24.
  if (exponent == 0) {
    f = static_cast<float>(m) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  uint32_t u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (m << 13);
  memcpy(&f, &u, 4);
  return f;
#endif
}

// Rounds to nearest even and keeps NaN.
FRD_HD static inline void store(float& d, float v) { d = v; }
FRD_HD static inline void store(double& d, double v) { d = v; }
FRD_HD static inline void store(bf16& d, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  d.bits = v != v ? 0x7fc0u : static_cast<uint16_t>(rounded);
}
FRD_HD static inline void store(f16& d, float v) {
#if defined(__CUDACC__)
  d.bits = __half_raw(__float2half_rn(v)).x;
#elif defined(__F16C__) || defined(__aarch64__)
  _Float16 h = static_cast<_Float16>(v);
  memcpy(&d.bits, &h, 2);
#else
  uint32_t u;
  memcpy(&u, &v, 4);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t a = u & 0x7fffffffu;
  uint32_t r;
  if (a > 0x7f800000u) {
    r = 0x7e00u;
  } else if (a >= 0x477ff000u) {
    // Rounds to infinity.
    r = 0x7c00u;
  } else if (a >= 0x38800000u) {
    // Normal.
    r = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding a number whose ulp is 2^-24 makes the FPU round.
    float f;
    float magic = 0.5f;
    memcpy(&f, &a, 4);
    f += magic;
    uint32_t b, m;
    memcpy(&b, &f, 4);
    memcpy(&m, &magic, 4);
    r = b - m;
  }
  d.bits = static_cast<uint16_t>(sign | r);
#endif
}

// Calls f(T{}) with the element type T of a dtype.
template <typename F>
inline auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(f32{});
    case DType::f64:
      return f(f64{});
    case DType::f16:
      return f(f16{});
    default:
      return f(bf16{});
  }
}

}  // namespace frd
