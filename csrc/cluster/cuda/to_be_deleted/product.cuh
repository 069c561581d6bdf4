// Products of a tile of rows with a matrix in global memory, by all threads of a block. Every sum is one
// chain over the reduction, whatever the tile.
#pragma once
#include "cluster/cuda/to_be_deleted/product_mma.cuh"

namespace frd {

template <class A>
struct alignas(16) Four {
  A v[4];
};

// sum[i][j]: of row 4 * warp + i and column first + 4 * lane + j of rows [m <= kTileRows, depth] * matrix.
// kTransposed: the matrix's transpose, whose rows are then the columns: element (k, n) at matrix[n * pitch +
// k], else at matrix[k * pitch + n]; `columns` of them are there. scratch: kProductScratch elements.
template <bool kTransposed, class T, class A>
class MultiplyAdd {
 public:
  __device__ MultiplyAdd(const A* rows, int lda, int m, const T* matrix, int64_t pitch, int first,
                         int columns, int depth, A* scratch)
      : rows_(rows),
        lda_(lda),
        m_(m),
        matrix_(matrix),
        pitch_(pitch),
        first_(first),
        columns_(columns),
        depth_(depth) {
    A* tile = scratch;
    A* row_tile = scratch + kProductDepth * kProductPitch;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
    fetch(0);
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += kProductDepth) {
      __syncthreads();
      put(tile, row_tile);
      __syncthreads();
      if (k0 + kProductDepth < depth) fetch(k0 + kProductDepth);
      multiply(tile, row_tile);
    }
  }

  A sum[4][4];

 private:
  // The place of this thread's part (i, j) of the next tile.
  static __device__ int tile_k(int i, int j) {
    return kTransposed ? lane_of_warp() % 8 + 8 * j : warp_of_block() + 8 * j;
  }
  static __device__ int tile_n(int i, int j) {
    return kTransposed ? warp_of_block() * 4 + lane_of_warp() / 8 + 32 * i : lane_of_warp() + 32 * i;
  }

  __device__ void fetch(int k0) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = k0 + tile_k(i, j), n = first_ + tile_n(i, j);
        const bool there = k < depth_ && n < columns_;
        next_[i][j] = there ? matrix_[kTransposed ? n * pitch_ + k : k * pitch_ + n] : T{};
      }
    const int row = threadIdx.x / 8, k = k0 + threadIdx.x % 8 * 4;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      next_row_.v[e] = row < m_ && k + e < depth_ ? rows_[static_cast<int64_t>(row) * lda_ + k + e] : A(0);
  }

  __device__ void put(A* tile, A* row_tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) tile[tile_k(i, j) * kProductPitch + tile_n(i, j)] = load(next_[i][j]);
    *reinterpret_cast<Four<A>*>(row_tile + threadIdx.x / 8 * kProductRowPitch + threadIdx.x % 8 * 4) =
        next_row_;
  }

  __device__ void multiply(const A* tile, const A* row_tile) {
    if (warp_of_block() * 4 >= m_) return;
    const A* own_rows = row_tile + warp_of_block() * 4 * kProductRowPitch;
    const A* own_columns = tile + lane_of_warp() * 4;
#pragma unroll 2
    for (int k = 0; k < kProductDepth; k += 4) {
      Four<A> a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const Four<A>*>(own_rows + i * kProductRowPitch + k);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Four<A> b = *reinterpret_cast<const Four<A>*>(own_columns + (k + e) * kProductPitch);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += a[i].v[e] * b.v[j];
      }
    }
  }

  const A* rows_;
  int lda_, m_;
  const T* matrix_;
  int64_t pitch_;
  int first_, columns_, depth_;
  T next_[4][4];
  Four<A> next_row_;
};

// As rows_times_weight; begins after a barrier and ends without.
template <bool kTransposed, class T>
FRD_DEVICE void fma_rows_times_weight(const compute_t<T>* rows, int lda, int m, const T* weight, int channels,
                                      compute_t<T>* out, int ldo, compute_t<T>* scratch) {
  for (int row = 0; row < m; row += kTileRows)
    for (int first = 0; first < channels; first += kProductColumns) {
      const int count = m - row < kTileRows ? m - row : kTileRows;
      const MultiplyAdd<kTransposed, T, compute_t<T>> product(rows + static_cast<int64_t>(row) * lda, lda,
                                                              count, weight, channels, first, channels,
                                                              channels, scratch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = row + warp_of_block() * 4 + i;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (const int column = first + lane_of_warp() * 4 + j; at < row + count && column < channels)
            out[static_cast<int64_t>(at) * ldo + column] = product.sum[i][j];
      }
    }
}

// out [m, channels] (row pitch ldo) = rows [m, channels] (row pitch lda) * W^T (kTransposed), or * W, with
// the weight W [channels, channels] in global memory. `out` must not be `rows`. Rows are read after a
// barrier; ends with one. scratch: kProductScratch elements of shared memory. kParts: 16-bit parts that rows
// are split into before a 16-bit weight: 1 where they are of its type, 3 for the precision of float.
template <bool kTransposed, class T, int kParts = 3>
FRD_DEVICE void rows_times_weight(const compute_t<T>* rows, int lda, int m, const T* weight, int channels,
                                  compute_t<T>* out, int ldo, compute_t<T>* scratch) {
  __syncthreads();
  bool done = false;
  if constexpr (sizeof(T) == 2) {
    done = fits_mma(rows, lda, weight, channels, out, ldo);
    if (done)
      mma_rows_times_weight<kTransposed, T, kParts>(rows, lda, m, weight, channels, out, ldo, scratch);
  }
  if (!done) fma_rows_times_weight<kTransposed, T>(rows, lda, m, weight, channels, out, ldo, scratch);
  __syncthreads();
}

}  // namespace frd
