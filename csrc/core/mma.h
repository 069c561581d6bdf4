// Tensor core and asynchronous copy instructions (sm_80 and later); the block emulator has its own versions.
// Fragments are laid out as in the PTX ISA; with g = lane / 4 and t = lane % 4 a lane holds
//   m16n8k16 a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour
//   m16n8k16 b: (2t, g), (2t + 8, g), each with its lower neighbour
//   m16n8k8 a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   m16n8k8 b: (t, g), (t + 4, g)
//   both d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once
#include <type_traits>

#include "core/cuda_compat.h"
#include "core/dtypes.h"
#if !defined(__CUDACC__)
#include "mma_emulated.h"
#endif

namespace frd {

#define FRD_DEVICE static __device__ __forceinline__

// Packs two 16-bit values, the first in the low half.
FRD_DEVICE uint32_t join_halves(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(high) << 16 | low;
}

#if defined(__CUDACC__)

FRD_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) to 16 bytes of shared memory and fills the rest with zeros; both addresses are
// aligned to 16 bytes.
FRD_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
// The same for 4 bytes.
FRD_DEVICE void cp_async_4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
// Commits this thread's copies since the last call as one group.
FRD_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the newest kGroups groups of this thread. Other threads see the data after a barrier.
template <int kGroups>
FRD_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Loads kCount 8x8 matrices of 16-bit elements; lane 8 j + i passes the address of row i of matrix j.
// Register j receives elements 2t and 2t + 1 of row g of matrix j, or if kTransposed of its column g.
template <int kCount, bool kTransposed = false>
FRD_DEVICE void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4, "matrices of one load");
  const uint32_t at = shared_address(row);
  if constexpr (kCount == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  }
}

#define FRD_MMA(shape_and_types)                                                         \
  asm(shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d [16, 8] += a [16, 16] b [16, 8]; T: bf16 or f16
template <class T>
FRD_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    FRD_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    FRD_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
// d [16, 8] += a [16, 8] b [8, 8]; operands are the bits of float, whose low 13 are ignored
FRD_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FRD_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FRD_MMA

// Two floats rounded to T, the first in the low half; NaN stays NaN.
template <class T>
FRD_DEVICE uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The same with a ReLU that keeps NaN.
template <class T>
FRD_DEVICE uint32_t pack_relu(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The ReLU of two numbers of T; NaN stays NaN.
template <class T>
FRD_DEVICE uint32_t relu_pair(uint32_t v) {
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(0));
  return r;
}

#endif

// The two numbers that pack() joined.
template <class T>
FRD_DEVICE void unpack(uint32_t v, float& low, float& high) {
  low = load(T{static_cast<uint16_t>(v & 0xffffu)});
  high = load(T{static_cast<uint16_t>(v >> 16)});
}

}  // namespace frd
