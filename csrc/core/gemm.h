// Single-threaded GEMM for the CPU kernels, c = (or +=) a b; the caller distributes tiles over threads.
//
// The right operand is packed into panels of `panel` columns: element (k, n) of b [K, N] is at
// packed[(n / panel) * K * panel + k * panel + n % panel], with the last panel padded with zeros. A kernel
// that computes its operand may write this layout directly. Each element of c is one chain of multiply-adds
// over k, in blocks of `k_block`, so its rounding depends on K alone and not on how M and N are tiled.
#pragma once
#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace frd {

template <class A>
struct GemmOps {
  // Columns of a panel.
  int64_t panel;
  // Depth after which a partial sum is stored in c.
  int64_t k_block;
  // Elements of a packed [k, n] matrix.
  int64_t (*packed_size)(int64_t k, int64_t n);
  // Packs b [k, n], whose element (i, j) is at b[i * rs + j * cs].
  void (*pack)(const A* b, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed);
  // c [m, n] = a b, or += if accumulate. a [m, k] and c are row-major with row strides lda and ldc.
  void (*run)(const A* a, int64_t lda, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
              bool accumulate);
  // c [m, n] = a^T b of a [k, m], otherwise the same.
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
