// 32-bit words of one float32 or two 16-bit elements, and predicated loads, stores and asynchronous copies.
#pragma once
#include "core/cuda_compat.h"
#include "core/dtypes.h"
#include "core/mma.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace frd {

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

__device__ __forceinline__ void unpack(uint32_t word, float (&v)[1], float) { memcpy(v, &word, 4); }
__device__ __forceinline__ void unpack(uint32_t word, float (&v)[2], bf16) {
  v[0] = load(bf16{static_cast<uint16_t>(word)});
  const uint32_t high = word & 0xffff0000u;
  memcpy(v + 1, &high, 4);
}
__device__ __forceinline__ void unpack(uint32_t word, float (&v)[2], f16) {
  v[0] = load(f16{static_cast<uint16_t>(word)});
  v[1] = load(f16{static_cast<uint16_t>(word >> 16)});
}

__device__ __forceinline__ uint32_t pack(const float (&v)[1], float) {
  uint32_t word;
  memcpy(&word, v, 4);
  return word;
}
#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t pack(const float (&v)[2], bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v[0], v[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
__device__ __forceinline__ uint32_t pack(const float (&v)[2], f16) {
  const __half2 pair = __floats2half2_rn(v[0], v[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
#else
template <class T>
uint32_t pack(const float (&v)[2], T) {
  T low, high;
  store(low, v[0]);
  store(high, v[1]);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
#endif

// Asynchronous copy of 4, 8 or 16 bytes into shared memory; if not `inside` it writes zeros and reads
// nothing. The predicate saves the instruction that would select cp.async's byte count.
template <int bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#if defined(__CUDACC__)
  if constexpr (bytes == 16) {
    asm volatile("{.reg .pred p; setp.eq.u32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p;}" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(static_cast<uint32_t>(inside))
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.eq.u32 p, %3, 0; cp.async.ca.shared.global [%0], [%1], %2, p;}" ::"r"(
                     shared_address(to)),
                 "l"(from), "n"(bytes), "r"(static_cast<uint32_t>(inside))
                 : "memory");
  }
#else
  emulated::issue(to, from, inside ? bytes : 0, bytes);
#endif
}

__device__ __forceinline__ void wait_async() {
  cp_async_commit();
  cp_async_wait<0>();
}

// Read-only loads; 0 if not `inside`. A predicate rather than a branch, into which the compiler would move
// the address arithmetic that neighbouring loads share.
__device__ __forceinline__ uint4 load_words_if(bool inside, const void* from) {
  uint4 v{0, 0, 0, 0};
#if defined(__CUDACC__)
  asm("{.reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<uint32_t>(inside)));
#else
  if (inside) memcpy(&v, from, sizeof(v));
#endif
  return v;
}
__device__ __forceinline__ float load_element_if(bool inside, const float* from) {
  float v = 0.f;
#if defined(__CUDACC__)
  asm("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.f32 %0, [%1];}"
      : "+f"(v)
      : "l"(from), "r"(static_cast<uint32_t>(inside)));
#else
  if (inside) v = *from;
#endif
  return v;
}
template <class T>
__device__ __forceinline__ float load_element_if(bool inside, const T* from) {
  T v{0};
#if defined(__CUDACC__)
  asm("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1];}"
      : "+h"(v.bits)
      : "l"(from), "r"(static_cast<uint32_t>(inside)));
#else
  if (inside) v = *from;
#endif
  return load(v);
}

// A load of memory that the kernel also writes, which must not go through the read-only cache; 0 if not
// `inside`.
template <class V>
__device__ __forceinline__ V load_written_if(bool inside, const void* from) {
  V v{};
  if (inside) v = *static_cast<const V*>(from);
  return v;
}

// Streaming stores (evict first), as no later block reads the data. Predicated, without a branch around the
// arithmetic before them.
__device__ __forceinline__ void store_word_if(bool inside, void* to, uint32_t word) {
#if defined(__CUDACC__)
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.cs.u32 [%0], %1;}" ::"l"(to), "r"(word),
               "r"(static_cast<uint32_t>(inside))
               : "memory");
#else
  if (inside) memcpy(to, &word, sizeof(word));
#endif
}
__device__ __forceinline__ void store_element_if(bool inside, float* to, float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  store_word_if(inside, to, word);
}
template <class T>
__device__ __forceinline__ void store_element_if(bool inside, T* to, float value) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
  const float pair[2] = {value, value};
  const uint32_t word = pack(pair, T{});
#if defined(__CUDACC__)
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.cs.u16 [%0], %1;}" ::"l"(to),
               "h"(static_cast<uint16_t>(word)), "r"(static_cast<uint32_t>(inside))
               : "memory");
#else
  if (inside) memcpy(to, &word, 2);
#endif
}
__device__ __forceinline__ void store_words_if(bool inside, void* to, const uint4& words) {
#if defined(__CUDACC__)
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(static_cast<uint32_t>(inside))
      : "memory");
#else
  if (inside) memcpy(to, &words, sizeof(words));
#endif
}

}  // namespace frd
