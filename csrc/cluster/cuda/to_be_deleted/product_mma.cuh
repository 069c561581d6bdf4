// The products of product.cuh with a 16-bit weight on the tensor cores. Rows of float are split into
// 16-bit parts whose sum they are; the weight goes from global memory straight into registers.
#pragma once
#include "cluster/cuda/to_be_deleted/tiles.cuh"

namespace frd {

// The power of two that brings a row's largest magnitude to 2^kExponent * [1, 2), as f16 needs it; 1 where
// that is zero or not finite.
template <int kExponent>
FRD_DEVICE float power_of_two_factor(float largest) {
  uint32_t bits;
  memcpy(&bits, &largest, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255);
  if (exponent == 0 ? largest == 0 : exponent == 255) return 1;
  const int wanted = 254 + kExponent - (exponent < 1 ? 1 : exponent);  // biased exponent of the factor
  bits = static_cast<uint32_t>(wanted > 254 ? 254 : wanted < 1 ? 1 : wanted) << 23;
  float factor;
  memcpy(&factor, &bits, 4);
  return factor;
}

FRD_DEVICE float magnitude_of_row(const float* row, int n) {
  float largest = 0;
  for (int c = lane_of_warp(); c < n; c += 32) largest = fmaxf(largest, fabsf(row[c]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  return largest;
}

// Takes the leading 16 bits of two numbers and leaves the rest of them. An infinity has no rest.
template <class T>
FRD_DEVICE uint32_t take_part(float& low, float& high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>) {  // cut, not rounded, as that could overflow
    uint32_t a, b;
    memcpy(&a, &low, 4), memcpy(&b, &high, 4);
    pair = a >> 16 | (b & 0xffff0000u);
  } else {
    pair = pack<T>(low, high);
  }
  float first, second;
  unpack<T>(pair, first, second);
  low = fabsf(first) < INFINITY ? low - first : 0.f;
  high = fabsf(second) < INFINITY ? high - second : 0.f;
  return pair;
}

// out = rows * W^T or rows * W, 16 * kTiles rows and 32 columns for a warp at a time.
//
// The order of the reduction is free, so that lane t of four holds the elements 8t .. 8t + 7 of each 32, of
// the rows and of the weight alike: whole vectors in memory. kTransposed: columns of the result are rows of
// W, and lane g of eight holds row g of each eight; else lane g holds columns 4g .. 4g + 3 of 32.
template <bool kTransposed, class T, int kParts, int kTiles>
class MmaProduct {
 public:
  // factors [m]: of the rows where T is f16 and kParts > 1, powers of two that bring them into its range
  __device__ MmaProduct(const float* rows, int lda, int m, const T* weight, int channels,
                        const float* factors)
      : lda_(lda), m_(m), weight_(weight), channels_(channels), rows_(rows) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        factor_[i][half] = kScaled && there(i, half) ? factors[row(i, half)] : 1.f;
  }

  __device__ void run(int first, float* out, int ldo) const {
    float sum[kTiles][4][4];
#pragma unroll
    for (auto& tile : sum)
#pragma unroll
      for (auto& d : tile)
#pragma unroll
        for (float& v : d) v = 0;
    uint32_t next[4][4];
    fetch(first, 0, next);
#pragma unroll 1
    for (int k = 0; k < channels_; k += 32) {
      uint32_t b[4][4];
      arrange(next, b);
      if (k + 32 < channels_) fetch(first, k + 32, next);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) multiply(i, k, b, sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (there(i, half)) put(out + row(i, half) * ldo + first, sum[i], half, 1.f / factor_[i][half]);
  }

 private:
  static constexpr bool kScaled = std::is_same_v<T, f16> && kParts > 1;
  static constexpr int kCount = std::is_same_v<T, f16> && kParts > 2 ? 2 : kParts;  // two of f16 have 22 bits

  static __device__ int group() { return lane_of_warp() / 4; }
  static __device__ int in_group() { return lane_of_warp() % 4; }
  static __device__ int row(int i, int half) { return i * 16 + half * 8 + group(); }
  __device__ bool there(int i, int half) const { return row(i, half) < m_; }

  // Elements k + 8 t on: kTransposed: eight of the weight's row first + 8 j + g in words[j]; else four of its
  // row k + 8 t + 2 j in words[j][0 .. 1], of the next row in words[j][2 .. 3].
  __device__ void fetch(int first, int k, uint32_t (&words)[4][4]) const {
    const int depth = k + 8 * in_group();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kTransposed) {
        const T* from = weight_ + static_cast<int64_t>(first + 8 * j + group()) * channels_ + depth;
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[j][0] = v.x, words[j][1] = v.y, words[j][2] = v.z, words[j][3] = v.w;
      } else {
        const T* from = weight_ + static_cast<int64_t>(depth + 2 * j) * channels_ + first + 4 * group();
        const uint2 v = *reinterpret_cast<const uint2*>(from),
                    w = *reinterpret_cast<const uint2*>(from + channels_);
        words[j][0] = v.x, words[j][1] = v.y, words[j][2] = w.x, words[j][3] = w.y;
      }
    }
  }

  // b[column tile j][pair of the reduction p]
  static __device__ void arrange(const uint32_t (&words)[4][4], uint32_t (&b)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        if constexpr (kTransposed) {
          b[j][p] = words[j][p];
        } else {
          const uint32_t upper = words[p][j / 2], lower = words[p][2 + j / 2];
          b[j][p] = j % 2 == 0 ? (upper & 0xffffu) | lower << 16 : upper >> 16 | (lower & 0xffff0000u);
        }
      }
  }

  __device__ void multiply(int i, int k, const uint32_t (&b)[4][4], float (&sum)[4][4]) const {
    float v[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        float4 four{0, 0, 0, 0};
        if (there(i, half))
          four = *reinterpret_cast<const float4*>(rows_ + row(i, half) * lda_ + k + 8 * in_group() + e);
        v[half][e] = four.x, v[half][e + 1] = four.y, v[half][e + 2] = four.z, v[half][e + 3] = four.w;
      }
      if constexpr (kScaled) {
#pragma unroll
        for (float& x : v[half]) x *= factor_[i][half];
      }
    }
    float chunk[4][4] = {};  // the tensor cores cut their sums: kept short, and added with rounding
#pragma unroll
    for (int part = 0; part < kCount; ++part)
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& low = v[r % 2][e + r / 2 * 2];
          float& high = v[r % 2][e + r / 2 * 2 + 1];
          a[r] = part + 1 < kCount ? take_part<T>(low, high) : pack<T>(low, high);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(chunk[j], a, b[j][e / 2], b[j][e / 2 + 1]);
      }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] += chunk[j][e];
  }

  // to: the row's 32 columns
  static __device__ void put(float* to, const float (&sum)[4][4], int half, float factor) {
    const int t = in_group();
    const auto at = [&](int j, int e) {
      return kScaled ? sum[j][2 * half + e] * factor : sum[j][2 * half + e];
    };
    if constexpr (kTransposed) {
#pragma unroll
      for (int j = 0; j < 4; ++j) *reinterpret_cast<float2*>(to + 8 * j + 2 * t) = {at(j, 0), at(j, 1)};
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float4*>(to + 8 * t + 4 * e) = {at(0, e), at(1, e), at(2, e), at(3, e)};
    }
  }

  int lda_, m_;
  const T* weight_;
  int channels_;
  const float* rows_;
  float factor_[kTiles][2];
};

// Whether a product can run so.
template <class T>
FRD_DEVICE bool fits_mma(const float* rows, int lda, const T* weight, int channels, const float* out,
                         int ldo) {
  return channels % 32 == 0 && lda % 4 == 0 && ldo % 4 == 0 && aligned_16(rows) && aligned_16(out) &&
         aligned_16(weight);
}

// As rows_times_weight; begins after a barrier and ends without. scratch: kTileRows elements.
template <bool kTransposed, class T, int kParts>
FRD_DEVICE void mma_rows_times_weight(const float* rows, int lda, int m, const T* weight, int channels,
                                      float* out, int ldo, float* scratch) {
  for (int row = 0; row < m; row += kTileRows) {
    const int count = m - row < kTileRows ? m - row : kTileRows;
    const float* tile = rows + static_cast<int64_t>(row) * lda;
    float* to = out + static_cast<int64_t>(row) * ldo;
    if constexpr (std::is_same_v<T, f16> && kParts > 1) {
      __syncthreads();
      for (int i = warp_of_block(); i < count; i += kTeamWarps) {
        const float factor = power_of_two_factor<14>(magnitude_of_row(tile + i * lda, channels));
        if (lane_of_warp() == 0) scratch[i] = factor;
      }
      __syncthreads();
    }
    const auto run = [&](auto tiles) {
      const MmaProduct<kTransposed, T, kParts, decltype(tiles)::value> product(tile, lda, count, weight,
                                                                               channels, scratch);
      for (int first = warp_of_block() * 32; first < channels; first += kTeamWarps * 32)
        product.run(first, to, ldo);
    };
    if (count > 16)
      run(std::integral_constant<int, 2>());
    else
      run(std::integral_constant<int, 1>());
  }
}

}  // namespace frd
