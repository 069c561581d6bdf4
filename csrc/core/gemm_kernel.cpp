#include "gemm.h"

#include "vec.h"

namespace frd {
namespace FRD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 4;
#endif
// A panel of this depth and the rows it is multiplied with stay in the first two cache levels.
constexpr int64_t kBlockK = 384;

template <class A>
constexpr int64_t kPanel = 2 * Vec<A>::lanes;

// c [ROWS, columns] = (or +=) a b. Element (i, k) of a is at a[i * rs + k * cs]; b is a panel [k, panel];
// columns <= NV * lanes, and the columns beyond are not written.
template <class A, int ROWS, int NV>
void micro(const A* a, int64_t rs, int64_t cs, const A* b, A* c, int64_t ldc, int64_t columns, int64_t k,
           bool accumulate) {
  using V = Vec<A>;
  typename V::type acc[ROWS][NV] = {};
  for (int64_t p = 0; p < k; ++p) {
    typename V::type right[NV];
    for (int j = 0; j < NV; ++j) right[j] = V::load(b + p * kPanel<A> + j * V::lanes);
    const A* left = a + p * cs;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NV; ++j) acc[i][j] += left[i * rs] * right[j];
  }
  if (columns == NV * V::lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NV; ++j) {
        A* at = c + i * ldc + j * V::lanes;
        V::store(at, accumulate ? V::load(at) + acc[i][j] : acc[i][j]);
      }
    return;
  }
  A row[NV * V::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < NV; ++j) V::store(row + j * V::lanes, acc[i][j]);
    for (int64_t j = 0; j < columns; ++j) c[i * ldc + j] = accumulate ? c[i * ldc + j] + row[j] : row[j];
  }
}

template <class A>
using Micro = void (*)(const A*, int64_t, int64_t, const A*, A*, int64_t, int64_t, int64_t, bool);

template <class A, int NV>
Micro<A> micro_for(int64_t rows) {
  switch (rows) {
    case 1:
      return micro<A, 1, NV>;
    case 2:
      return micro<A, 2, NV>;
    case 3:
      return micro<A, 3, NV>;
    case 4:
      return micro<A, 4, NV>;
#if defined(__AVX2__)
    case 5:
      return micro<A, 5, NV>;
    case 6:
      return micro<A, 6, NV>;
#endif
#if defined(__AVX512F__)
    case 7:
      return micro<A, 7, NV>;
    case 8:
      return micro<A, 8, NV>;
    case 9:
      return micro<A, 9, NV>;
    case 10:
      return micro<A, 10, NV>;
    case 11:
      return micro<A, 11, NV>;
    case 12:
      return micro<A, 12, NV>;
#endif
    default:
      return nullptr;
  }
}

template <class A>
void product(const A* a, int64_t rs, int64_t cs, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n,
             int64_t k, bool accumulate) {
  constexpr int64_t panel = kPanel<A>;
  constexpr int64_t lanes = Vec<A>::lanes;
  if (m <= 0 || n <= 0) return;
  // Blocks of nearly equal height, so that none is a thin remainder.
  const int64_t blocks = (m + kMaxRows - 1) / kMaxRows;
  const int64_t height = m / blocks;
  const int64_t taller = m % blocks;
  int64_t k0 = 0;
  // Runs once for k == 0, which clears c.
  do {
    const int64_t depth = k - k0 < kBlockK ? k - k0 : kBlockK;
    const bool add = accumulate || k0 > 0;
    for (int64_t j = 0; j < n; j += panel) {
      const int64_t columns = n - j < panel ? n - j : panel;
      const bool half = columns <= lanes;
      const Micro<A> tall = half ? micro_for<A, 1>(height + 1) : micro_for<A, 2>(height + 1);
      const Micro<A> low = half ? micro_for<A, 1>(height) : micro_for<A, 2>(height);
      const A* right = packed + j * k + k0 * panel;
      const A* left = a + k0 * cs;
      A* out = c + j;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t rows = height + (b < taller);
        (b < taller ? tall : low)(left, rs, cs, right, out, ldc, columns, depth, add);
        left += rows * rs;
        out += rows * ldc;
      }
    }
    k0 += kBlockK;
  } while (k0 < k);
}

template <class A>
void run(const A* a, int64_t lda, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
         bool accumulate) {
  product<A>(a, lda, 1, packed, c, ldc, m, n, k, accumulate);
}

template <class A>
void run_at(const A* a, int64_t lda, const A* packed, A* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
            bool accumulate) {
  product<A>(a, 1, lda, packed, c, ldc, m, n, k, accumulate);
}

template <class A>
int64_t packed_size(int64_t k, int64_t n) {
  return (n + kPanel<A> - 1) / kPanel<A> * kPanel<A> * k;
}

// out [lanes, lanes] (row stride panel) = transpose of b [lanes, lanes] (row stride cs), by log2(lanes)
// rounds that interleave row i with row i + lanes / 2.
template <class A, class Mask>
void transpose_square(const A* b, int64_t cs, A* out) {
  using V = Vec<A>;
  constexpr int lanes = V::lanes;
  constexpr int rounds = lanes == 16 ? 4 : lanes == 8 ? 3 : lanes == 4 ? 2 : 1;
  typedef Mask MaskVec __attribute__((vector_size(kVecBytes)));
  MaskVec low, high;
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / 2 + (i % 2) * lanes;
    high[i] = lanes / 2 + i / 2 + (i % 2) * lanes;
  }
  typename V::type rows[lanes], next[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) rows[i] = V::load(b + i * cs);
#pragma GCC unroll 4
  for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + lanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) V::store(out + i * kPanel<A>, rows[i]);
}

// Packs `columns` columns of b [k, columns] into one panel.
template <class A, class T>
void pack_elements(const T* b, int64_t rs, int64_t cs, int64_t k, int64_t columns, A* out) {
  constexpr int64_t panel = kPanel<A>;
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t j = 0; j < columns; ++j) out[p * panel + j] = load(b[p * rs + j * cs]);
    for (int64_t j = columns; j < panel; ++j) out[p * panel + j] = 0;
  }
}

template <class A, class T>
void pack(const T* b, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed) {
  constexpr int64_t panel = kPanel<A>;
  for (int64_t j = 0; j < n; j += panel)
    pack_elements<A, T>(b + j * cs, rs, cs, k, n - j < panel ? n - j : panel, packed + j * k);
}

// Without a conversion, whole panels are packed by vectors or by square transposes.
template <class A, class Mask>
void pack_same(const A* b, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed) {
  using V = Vec<A>;
  constexpr int64_t panel = kPanel<A>;
  constexpr int64_t lanes = V::lanes;
  for (int64_t j = 0; j < n; j += panel) {
    const A* in = b + j * cs;
    A* out = packed + j * k;
    int64_t done = 0;
    if (n - j >= panel && cs == 1) {
      for (; done < k; ++done)
        for (int64_t v = 0; v < panel; v += lanes)
          V::store(out + done * panel + v, V::load(in + done * rs + v));
    } else if (n - j >= panel && rs == 1) {
      for (; done + lanes <= k; done += lanes)
        for (int64_t v = 0; v < panel; v += lanes)
          transpose_square<A, Mask>(in + done + v * cs, cs, out + done * panel + v);
    }
    const int64_t columns = n - j < panel ? n - j : panel;
    pack_elements<A, A>(in + done * rs, rs, cs, k - done, columns, out + done * panel);
  }
}

}  // namespace

const GemmKernels& gemm_kernels() {
  static const GemmKernels table = {
      {kPanel<float>, kBlockK, packed_size<float>, pack_same<float, int32_t>, run<float>, run_at<float>},
      {kPanel<double>, kBlockK, packed_size<double>, pack_same<double, int64_t>, run<double>, run_at<double>},
      pack<float, bf16>,
      pack<float, f16>,
  };
  return table;
}

}  // namespace FRD_ISA
}  // namespace frd
