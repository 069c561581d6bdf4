// A block's matrix product: rows [kM, 32 words] times columns [kN, 32 words] of shared memory, both permuted
// as block_shape.cuh says, summed over the words. Every sum is one chain over the reduction, whatever the
// tile.
#pragma once
#include "pdc_block/block_shape.cuh"

namespace frd {

// 16 bit, by the tensor cores.
template <class T, int kM, int kN, int kWarpM, int kWarpN>
class TileProduct {
 public:
  // Consecutive columns of the result that finish() hands out at once.
  static constexpr int kVector = kWarpN >= 32 ? 8 : 2;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : sum_)
#pragma unroll
      for (auto& tile : row)
#pragma unroll
        for (float& s : tile) s = 0;
  }

  __device__ __forceinline__ void add(const uint32_t* rows, const uint32_t* columns) {
    const int lane = threadIdx.x % 32;
    // rows 0-7 and 8-15 of the first eight elements, then of the next eight
    const int row_offset = (first_row() + lane % 16) * 32 + ((lane / 16) ^ (lane & 7)) * 4;
    // of columns 0-7 the first eight elements and the next eight, then of columns 8-15
    const int column = kWarpN == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
    const int column_offset = (first_column() + column) * 32 + ((lane / 8 % 2) ^ (lane & 7)) * 4;
#pragma unroll 2
    for (int k = 0; k < 32; k += 8) {
      uint32_t a[kWarpM / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) ldmatrix<4>(a[i], rows + i * 16 * 32 + (row_offset ^ k));
      if constexpr (kWarpN == 8) {
        uint32_t b[2];
        ldmatrix<2>(b, columns + (column_offset ^ k));
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) mma_m16n8k16<T>(sum_[i][0], a[i], b[0], b[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kWarpN / 8; j += 2) {
          uint32_t b[4];
          ldmatrix<4>(b, columns + j * 8 * 32 + (column_offset ^ k));
#pragma unroll
          for (int i = 0; i < kWarpM / 16; ++i) {
            mma_m16n8k16<T>(sum_[i][j], a[i], b[0], b[1]);
            mma_m16n8k16<T>(sum_[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  // f(row, column, float (&)[kVector]) for every vector of this thread
  template <class F>
  __device__ __forceinline__ void finish(const F& f) {
    const int lane = threadIdx.x % 32, t = lane % 4, row0 = first_row() + lane / 4, column0 = first_column();
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + i * 16 + half * 8;
        if constexpr (kVector == 2) {
          float v[2] = {sum_[i][0][2 * half], sum_[i][0][2 * half + 1]};
          f(row, column0 + 2 * t, v);
        } else {
#pragma unroll
          for (int j = 0; j < kWarpN / 8; j += 4) {
            float v[8];
#pragma unroll
            for (int n = 0; n < 4; ++n)
              v[2 * n] = sum_[i][j + n][2 * half], v[2 * n + 1] = sum_[i][j + n][2 * half + 1];
            transpose(v, t);
            f(row, column0 + (j + t) * 8, v);
          }
        }
      }
    }
  }

 private:
  // Four lanes hold a pair of columns of each of four tiles; afterwards each holds all eight columns of one
  // tile.
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

  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 / (kN / kWarpN) * kWarpM; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 32 % (kN / kWarpN) * kWarpN; }

  float sum_[kWarpM / 16][kWarpN / 8][4];
};

// 32 bit, by multiply-adds: exact products, and an infinity passes as it does in float32. Tensor cores would
// need each operand split into three products of tf32, at about the same speed without TMA and with
// infinities turned to NaN.
template <int kM, int kN, int kWarpM, int kWarpN>
class TileProduct<float, kM, kN, kWarpM, kWarpN> {
  static constexpr int kRowsOfThread = kWarpM / 4, kColumnsOfThread = kWarpN / 8;

 public:
  static constexpr int kVector = kColumnsOfThread >= 4 ? 4 : 1;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : sum_)
#pragma unroll
      for (float& s : row) s = 0;
  }

  __device__ __forceinline__ void add(const uint32_t* rows, const uint32_t* columns) {
    const int row0 = first_row();
#pragma unroll 1
    for (int group = 0; group < 8; ++group) {
      float4 r[kRowsOfThread];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) r[i] = four(rows, row0 + 4 * i, group);
#pragma unroll
      for (int j = 0; j < kColumnsOfThread; ++j) {
        const float4 c = four(columns, column_of(j), group);
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
          sum_[i][j] += r[i].x * c.x;
          sum_[i][j] += r[i].y * c.y;
          sum_[i][j] += r[i].z * c.z;
          sum_[i][j] += r[i].w * c.w;
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void finish(const F& f) {
    const int row0 = first_row();
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnsOfThread; j += kVector) {
        float v[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) v[e] = sum_[i][j + e];
        f(row0 + 4 * i, column_of(j), v);
      }
    }
  }

 private:
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x / 32 / (kN / kWarpN) * kWarpM + threadIdx.x % 32 / 8;
  }
  static __device__ __forceinline__ int column_of(int j) {
    const int first = threadIdx.x / 32 % (kN / kWarpN) * kWarpN + threadIdx.x % 8 * kVector;
    return first + j / kVector * 8 * kVector + j % kVector;
  }
  static __device__ __forceinline__ float4 four(const uint32_t* words, int row, int group) {
    return *reinterpret_cast<const float4*>(words + row * 32 + permuted<float>(row, group) * 4);
  }

  float sum_[kRowsOfThread][kColumnsOfThread];
};

}  // namespace frd
