// The matrix product of a thread block, from operands in shared memory. Each result is one chain of
// multiply-adds over the reduction, whatever the tile.
//
// Operands "along k" are [kM or kN, 32 words], each row 32 words of the reduction, swizzled as in shape.cuh.
// Operands "across k" are [kDepth, kM or kN] with kDepth elements in 32 words; for 16-bit elements the groups
// of four words of row k are swizzled by k & 7.
#pragma once
#include "pdc_block/cuda/shape.cuh"

namespace frd {

enum class Operands { along_k, across_k };

// result [kM, kN] = rows columns^T of 16-bit elements, by the tensor cores. kRowSums: also the sums of the
// rows of the left operand.
template <class T, int kM, int kN, int kWarpM, int kWarpN, bool kRowSums = false>
class TileProduct {
  static constexpr int kTilesM = kWarpM / 16;
  static constexpr int kTilesN = kWarpN / 8;

 public:
  // Consecutive columns of the result that finish() passes on at once.
  static constexpr int kVector = kWarpN >= 32 ? 8 : 2;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) zero(sum_[i][j]);
      if constexpr (kRowSums) zero(row_sum_[i]);
    }
  }

  // Adds the product of one slab. kRelu: applies a ReLU to the columns first.
  template <Operands kOperands = Operands::along_k, bool kRelu = false>
  __device__ __forceinline__ void add(const uint32_t* rows, const uint32_t* columns) {
    const Reader<kOperands> reader;
#pragma unroll 2
    for (int k = 0; k < 4; ++k) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) reader.rows(rows, i, k, a[i]);
      if constexpr (kRowSums) {
        constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) mma_m16n8k16<T>(row_sum_[i], a[i], kOnes, kOnes);
      }
      if constexpr (kTilesN == 1) {
        uint32_t b[2];
        reader.columns(columns, 0, k, b);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) mma_m16n8k16<T>(sum_[i][0], a[i], b[0], b[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kTilesN; j += 2) {
          uint32_t b[4];
          reader.columns(columns, j, k, b);
          if constexpr (kRelu) {
#pragma unroll
            for (uint32_t& pair : b) pair = relu_pair<T>(pair);
          }
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            mma_m16n8k16<T>(sum_[i][j], a[i], b[0], b[1]);
            mma_m16n8k16<T>(sum_[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  // Calls to.store(row, column, float (&)[kVector], to.prefetch(row, column)) for every vector of this
  // thread.
  template <class To>
  __device__ __forceinline__ void finish(const To& to) {
    const int lane = threadIdx.x % 32;
    const int t = lane % 4;
    const int row0 = first_row() + lane / 4;
    const int column0 = first_column();
    // Vectors of a row.
    constexpr int kVectors = kVector == 2 ? 1 : kTilesN / 4;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      decltype(to.prefetch(0, 0)) pending[2][kVectors];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
          pending[half][j] = to.prefetch(row0 + i * 16 + half * 8, column0 + (4 * j + t) * kVector);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          float v[kVector];
          if constexpr (kVector == 2) {
            v[0] = sum_[i][0][2 * half];
            v[1] = sum_[i][0][2 * half + 1];
          } else {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              v[2 * n] = sum_[i][4 * j + n][2 * half];
              v[2 * n + 1] = sum_[i][4 * j + n][2 * half + 1];
            }
            transpose(v, t);
          }
          to.store(row0 + i * 16 + half * 8, column0 + (4 * j + t) * kVector, v, pending[half][j]);
        }
    }
  }

  // Calls f(row, sum of that row of the left operand) once for each row of the tile.
  template <class F>
  __device__ __forceinline__ void finish_row_sums(const F& f) {
    if (first_column() != 0 || threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int row = first_row() + i * 16 + threadIdx.x % 32 / 4;
      f(row, row_sum_[i][0]);
      f(row + 8, row_sum_[i][2]);
    }
  }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / (kN / kWarpN) * kWarpM; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % (kN / kWarpN) * kWarpN; }
  static __device__ __forceinline__ void zero(float (&tile)[4]) {
#pragma unroll
    for (float& s : tile) s = 0;
  }

  // Loads fragments of 16 rows (tile i) and of 8 or 16 columns (tile j on) at elements 16 k of the reduction.
  // The lanes of a group of eight pass the rows of one 8x8 matrix. Of the two bits lane / 8 % 2 and lane /
  // 16, one selects the half of the rows or columns and the other the half of the reduction.
  template <Operands kOperands, class = void>
  struct Reader {
    int row_offset, column_offset;
    __device__ __forceinline__ Reader() {
      const int lane = threadIdx.x % 32;
      const int in_matrix = lane & 7;
      const int low = lane / 8 % 2;
      const int high = lane / 16;
      row_offset = (first_row() + low * 8 + in_matrix) * 32 + (high ^ in_matrix) * 4;
      column_offset =
          (first_column() + (kTilesN == 1 ? 0 : high * 8) + in_matrix) * 32 + (low ^ in_matrix) * 4;
    }
    __device__ __forceinline__ void rows(const uint32_t* from, int i, int k, uint32_t (&r)[4]) const {
      ldmatrix<4>(r, from + i * 16 * 32 + (row_offset ^ (8 * k)));
    }
    template <int kCount>
    __device__ __forceinline__ void columns(const uint32_t* from, int j, int k, uint32_t (&r)[kCount]) const {
      ldmatrix<kCount>(r, from + j * 8 * 32 + (column_offset ^ (8 * k)));
    }
  };
  template <class Unused>
  struct Reader<Operands::across_k, Unused> {
    int row_offset, column_offset;
    __device__ __forceinline__ Reader() {
      const int lane = threadIdx.x % 32;
      const int in_matrix = lane & 7;
      const int low = lane / 8 % 2;
      const int high = lane / 16;
      row_offset = (high * 8 + in_matrix) * (kM / 2) + ((first_row() / 8 + low) ^ in_matrix) * 4;
      column_offset = (low * 8 + in_matrix) * (kN / 2) + ((first_column() / 8 + high) ^ in_matrix) * 4;
    }
    __device__ __forceinline__ void rows(const uint32_t* from, int i, int k, uint32_t (&r)[4]) const {
      ldmatrix<4, true>(r, from + k * 16 * (kM / 2) + (row_offset ^ (8 * i)));
    }
    template <int kCount>
    __device__ __forceinline__ void columns(const uint32_t* from, int j, int k, uint32_t (&r)[kCount]) const {
      ldmatrix<kCount, true>(r, from + k * 16 * (kN / 2) + (column_offset ^ (4 * j)));
    }
  };

  // Before, four lanes each hold two columns of each of four tiles; after, each holds all eight columns of
  // one tile.
  static __device__ __forceinline__ void transpose(float (&v)[8], int t) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = t & bit;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n & bit) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& low = v[2 * n + e];
          float& high = v[2 * (n + bit) + e];
          const float received = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
          low = upper ? received : low;
          high = upper ? high : received;
        }
      }
    }
  }

  float sum_[kTilesM][kTilesN][4];
  float row_sum_[kRowSums ? kTilesM : 1][4];
};

// The same for float32, by multiply-adds in float32. Tensor cores would need three products of tf32 for each,
// at about the same speed without TMA, and would turn infinities into NaN.
template <int kM, int kN, int kWarpM, int kWarpN, bool kRowSums>
class TileProduct<float, kM, kN, kWarpM, kWarpN, kRowSums> {
  static constexpr int kRowsOfThread = kWarpM / 4;
  static constexpr int kColumnsOfThread = kWarpN / 8;

 public:
  static constexpr int kVector = kColumnsOfThread >= 4 ? 4 : 1;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
      for (float& s : sum_[i]) s = 0;
      if constexpr (kRowSums) row_sum_[i] = 0;
    }
  }

  template <Operands kOperands = Operands::along_k, bool kRelu = false>
  __device__ __forceinline__ void add(const uint32_t* rows, const uint32_t* columns) {
    const int row0 = first_row();
#pragma unroll 1
    for (int group = 0; group < 8; ++group) {
      if constexpr (kOperands == Operands::along_k) {
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2) add_pair<kRelu>(rows + pair, columns + pair, row0, group);
      } else {
#pragma unroll
        for (int k = 4 * group; k < 4 * group + 4; ++k)
          add_outer<kRelu>(rows + k * kM + row0, columns + k * kN);
      }
    }
  }

  template <class To>
  __device__ __forceinline__ void finish(const To& to) {
    const int row0 = first_row();
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      decltype(to.prefetch(0, 0)) pending[kColumnsOfThread / kVector];
#pragma unroll
      for (int j = 0; j < kColumnsOfThread; j += kVector)
        pending[j / kVector] = to.prefetch(row0 + 4 * i, column_of(j));
#pragma unroll
      for (int j = 0; j < kColumnsOfThread; j += kVector) {
        float v[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = sum_[i][j + e];
        to.store(row0 + 4 * i, column_of(j), v, pending[j / kVector]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void finish_row_sums(const F& f) {
    if (column_of(0) != 0) return;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) f(first_row() + 4 * i, row_sum_[i]);
  }

 private:
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x / 32 / (kN / kWarpN) * kWarpM + threadIdx.x % 32 / 8;
  }
  static __device__ __forceinline__ int column_of(int j) {
    const int first = threadIdx.x / 32 % (kN / kWarpN) * kWarpN + threadIdx.x % 8 * kVector;
    return first + j / kVector * 8 * kVector + j % kVector;
  }
  static __device__ __forceinline__ float2 two(const uint32_t* words) {
    return *reinterpret_cast<const float2*>(words);
  }
  static __device__ __forceinline__ float4 four(const uint32_t* words) {
    return *reinterpret_cast<const float4*>(words);
  }

  // Adds two elements of the reduction; four would not fit the registers beside 64 sums.
  template <bool kRelu>
  __device__ __forceinline__ void add_pair(const uint32_t* rows, const uint32_t* columns, int row0,
                                           int group) {
    float2 r[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      r[i] = two(rows + (row0 + 4 * i) * 32 + swizzled<float>(row0 + 4 * i, group) * 4);
      if constexpr (kRowSums) {
        row_sum_[i] += r[i].x;
        row_sum_[i] += r[i].y;
      }
    }
#pragma unroll
    for (int j = 0; j < kColumnsOfThread; ++j) {
      float2 c = two(columns + column_of(j) * 32 + swizzled<float>(column_of(j), group) * 4);
      if constexpr (kRelu) c = {relu(c.x), relu(c.y)};
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        sum_[i][j] += r[i].x * c.x;
        sum_[i][j] += r[i].y * c.y;
      }
    }
  }

  template <bool kRelu>
  __device__ __forceinline__ void add_outer(const uint32_t* rows, const uint32_t* columns) {
    static_assert(kVector == 4, "columns are read four at a time");
    float r[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      memcpy(&r[i], rows + 4 * i, 4);
      if constexpr (kRowSums) row_sum_[i] += r[i];
    }
#pragma unroll
    for (int j = 0; j < kColumnsOfThread; j += 4) {
      const float4 four_columns = four(columns + column_of(j));
      const float c[4] = {four_columns.x, four_columns.y, four_columns.z, four_columns.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float column = kRelu ? relu(c[e]) : c[e];
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) sum_[i][j + e] += r[i] * column;
      }
    }
  }

  float sum_[kRowsOfThread][kColumnsOfThread];
  float row_sum_[kRowSums ? kRowsOfThread : 1];
};

}  // namespace frd
