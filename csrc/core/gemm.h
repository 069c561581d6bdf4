// Tile GEMM for the CPU kernels: single-threaded pieces, the caller owns the parallelism.
//
// The right operand is packed into panels of `panel` columns: element (k, n) of a [K,N] matrix stands at
// packed[(n / panel) * K * panel + k * panel + n % panel], the last panel padded with zeros. A kernel that
// makes its operand itself (a stencil, say) may write this form directly. Each element of the result is a
// plain chain of multiply-adds over k, in blocks of `k_block`, so it depends on K alone, not on how M and N
// are tiled.
#pragma once
#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace frd {

template <class A>
struct GemmOps {
  int64_t panel;    // columns of a panel
  int64_t k_block;  // depth after which a partial sum goes through c
  // elements of the packed form of a [k,n] matrix
  int64_t (*packed_size)(int64_t k, int64_t n);
  // pack b [k,n], element (k, n) at b[k * rs + n * cs]
  void (*pack)(const A* b, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed);
  // c [m,n] (row stride ldc) = (or += if accumulate) a [m,k] (row stride lda, unit column stride) * packed
  // [k,n]
  void (*run)(const A* a, int64_t lda, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
              bool accumulate);
  // the same with a transposed: a [k,m] (row stride lda, unit column stride), c [m,n] = a^T * packed
  void (*run_at)(const A* a, int64_t lda, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
                 bool accumulate);
};

struct GemmKernels {
  GemmOps<float> f32;
  GemmOps<double> f64;
  void (*f32_pack_bf16)(const bf16* b, int64_t rs, int64_t cs, int64_t k, int64_t n, float* packed);
  void (*f32_pack_f16)(const f16* b, int64_t rs, int64_t cs, int64_t k, int64_t n, float* packed);
};

}  // namespace frd

FRD_ISA_TABLE(GemmKernels, gemm_kernels)
