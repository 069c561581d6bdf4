// The centre of each token of a tile: the largest cosine of its key with the units of all centres.
#pragma once
#include "cluster/cuda/to_be_deleted/product.cuh"

namespace frd {

// Arrays of a block, in shared memory or in its part of the workspace.
template <class A>
struct BlockArrays {
  A* product;           // [kProductScratch], shared
  A *scale, *weight;    // [kTileRows], shared
  A* cosine;            // [kTileRows], shared
  int32_t* label;       // [kTileRows], shared
  A *values, *keys;     // [kTileRows, pitch] tiles of tokens and their keys
  A* sums;              // [most centres, C] weighted sums of the block's tokens, by cluster
  A *masses, *tallies;  // [most centres] sums of their weights, and their number
};

// A score and its centre while the best one is looked for; `raw` is the score before its factor.
template <class A>
struct Best {
  A score, raw;
  int32_t centre;

  // Takes another one that `wins`, or equals in a lower centre: no matter in which order they come.
  __device__ void meet(A other_score, A other_raw, int32_t other) {
    const bool first = other < centre, nan = score != score, other_nan = other_score != other_score;
    const bool take = nan || other_nan ? other_nan && (!nan || first)
                                       : other_score > score || (other_score == score && first);
    if (take) score = other_score, raw = other_raw, centre = other;
  }
  // Takes that of the lane whose number differs by `bit`.
  __device__ void meet_lane(int bit) {
    const A other_score = __shfl_xor_sync(0xffffffffu, score, bit),
            other_raw = __shfl_xor_sync(0xffffffffu, raw, bit);
    meet(other_score, other_raw, __shfl_xor_sync(0xffffffffu, centre, bit));
  }
};

// Units are given as [centres, channels] with unit_inv_norm [centres], 1 / the norms that divided them; keys
// are in block.keys [m, pitch], divided by their norms 1 / block.scale.
template <class A>
struct Units {
  const A *rows, *scale;
  int centres, channels;
};

template <class A>
FRD_DEVICE void find_centres_by_fma(const BlockArrays<A>& block, int m, const Units<A>& units, A order) {
  Best<A> best[4];
#pragma unroll
  for (Best<A>& b : best) b = {-A(INFINITY), 0, units.centres};
  for (int first = 0; first < units.centres; first += kProductColumns) {
    const MultiplyAdd<true, A, A> scores(block.keys, tile_pitch(units.channels), m, units.rows,
                                         units.channels, first, units.centres, units.channels, block.product);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int centre = first + lane_of_warp() * 4 + j;
      if (centre >= units.centres) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) best[i].meet(order * scores.sum[i][j], scores.sum[i][j], centre);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) best[i].meet_lane(step);
    if (const int row = warp_of_block() * 4 + i; lane_of_warp() == 0 && row < m)
      block.label[row] = best[i].centre, block.cosine[row] = best[i].raw;
  }
}

// float on the tensor cores: keys and units as sums of two numbers of f16, which have 22 bits. Rows of norm 1
// are multiplied by a fixed power of two, and those whose norm counts as zero by one of their own, as f16 has
// a short range.
class MmaScores {
 public:
  static constexpr float kFactor = 8192;

  __device__ MmaScores(const BlockArrays<float>& block, int m, const Units<float>& units, float order)
      : block_(block),
        units_(units),
        m_(m),
        pitch_(tile_pitch(units.channels)),
        order_(order),
        wide_(aligned_16(units.rows)) {}

  __device__ void run() const {
    for (int i = warp_of_block(); i < m_; i += kTeamWarps) split_key(i);
    __syncthreads();
    if (m_ > 16)
      scan<2>();
    else
      scan<1>();
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= m_) return;
    Best<float> best = found(0, threadIdx.x);
    for (int warp = 1; warp < kTeamWarps; ++warp) {
      const Best<float> other = found(warp, threadIdx.x);
      best.meet(other.score, other.raw, other.centre);
    }
    block_.label[threadIdx.x] = best.centre;
    block_.cosine[threadIdx.x] = best.raw / factors()[threadIdx.x];
  }

 private:
  __device__ float* factors() const { return block_.product; }  // [kTileRows]
  // What a warp found best for a row.
  __device__ Best<float>& found(int warp, int row) const {
    return reinterpret_cast<Best<float>*>(block_.product + kTileRows)[warp * kTileRows + row];
  }

  // Key i times its factor, in place: the two parts of each element in one word, the leading one low.
  __device__ void split_key(int i) const {
    float* key = block_.keys + i * pitch_;
    float factor = kFactor;
    if (!is_live(block_.scale[i])) factor = power_of_two_factor<12>(magnitude_of_row(key, units_.channels));
    for (int c = lane_of_warp(); c < units_.channels; c += 32) {
      const float v = key[c] * factor;
      f16 high, low;
      store(high, v);
      store(low, v - load(high));
      const uint32_t word = join_halves(high.bits, low.bits);
      memcpy(key + c, &word, 4);
    }
    if (lane_of_warp() == 0) factors()[i] = factor;
  }

  // Elements k + 8t .. of a unit
  __device__ void fetch(const float* unit, int k, float (&v)[8]) const {
    const float* from = unit + k + lane_of_warp() % 4 * 8;
    if (wide_) {
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + e);
        v[e] = four.x, v[e + 1] = four.y, v[e + 2] = four.z, v[e + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = from[e];
    }
  }

  // The factor of a unit; its row is read by the four lanes that share it.
  __device__ float unit_factor(const float* unit, float scale) const {
    if (!__any_sync(0xffffffffu, !is_live(scale))) return kFactor;
    float largest = 0;
    for (int c = lane_of_warp() % 4; c < units_.channels; c += 4) largest = fmaxf(largest, fabsf(unit[c]));
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    return is_live(scale) ? kFactor : power_of_two_factor<12>(largest);
  }

  template <int kTiles>
  __device__ void scan() const {
    const int lane = lane_of_warp(), t = lane % 4;
    Best<float> best[2 * kTiles];
#pragma unroll
    for (Best<float>& b : best) b = {-INFINITY, 0, units_.centres};
    for (int first = warp_of_block() * 8; first < units_.centres; first += kTeamWarps * 8) {
      const int own = first + lane / 4 < units_.centres ? first + lane / 4 : first;
      const float* unit = units_.rows + static_cast<int64_t>(own) * units_.channels;
      const float factor = unit_factor(unit, units_.scale[own]);
      float sum[kTiles][4] = {};
      multiply<kTiles>(unit, factor, sum);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int centre = first + 2 * t + e;
        const float column_factor = __shfl_sync(0xffffffffu, factor, (2 * t + e) * 4);
        if (centre >= units_.centres) continue;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const float raw = sum[i / 2][i % 2 * 2 + e] / column_factor;
          best[i].meet(order_ * raw, raw, centre);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      best[i].meet_lane(1);
      best[i].meet_lane(2);
      if (t == 0) found(warp_of_block(), i / 2 * 16 + i % 2 * 8 + lane / 4) = best[i];
    }
  }

  // sum [16 * kTiles, 8] += keys * units^T; the reduction lies as in MmaProduct
  template <int kTiles>
  __device__ void multiply(const float* unit, float factor, float (&sum)[kTiles][4]) const {
    float next[8];
    fetch(unit, 0, next);
#pragma unroll 1
    for (int k = 0; k < units_.channels; k += 32) {
      uint32_t high[4], low[4];
#pragma unroll
      for (float& v : next) v *= factor;
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        high[p] = take_part<f16>(next[2 * p], next[2 * p + 1]);
        low[p] = pack<f16>(next[2 * p], next[2 * p + 1]);
      }
      if (k + 32 < units_.channels) fetch(unit, k + 32, next);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint4 words[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = i * 16 + half * 8 + lane_of_warp() / 4;
          const uint4* from = reinterpret_cast<const uint4*>(block_.keys + (row < m_ ? row : 0) * pitch_ + k +
                                                             lane_of_warp() % 4 * 8);
          words[half][0] = from[0], words[half][1] = from[1];
        }
        float chunk[4] = {};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t key_high[4], key_low[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const uint4& w = words[r % 2][e];
            const uint32_t first = r < 2 ? w.x : w.z, second = r < 2 ? w.y : w.w;
            key_high[r] = (first & 0xffffu) | second << 16;
            key_low[r] = first >> 16 | (second & 0xffff0000u);
          }
          mma_m16n8k16<f16>(chunk, key_low, high[2 * e], high[2 * e + 1]);
          mma_m16n8k16<f16>(chunk, key_high, low[2 * e], low[2 * e + 1]);
          mma_m16n8k16<f16>(chunk, key_high, high[2 * e], high[2 * e + 1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][e] += chunk[e];
      }
    }
  }

  const BlockArrays<float>& block_;
  const Units<float>& units_;
  int m_, pitch_;
  float order_;
  bool wide_;
};

// block.label and block.cosine [m]; destroys block.keys. order: the sign that cosines take for the
// comparison. All threads call it, after a barrier, and need one behind it.
template <class A>
FRD_DEVICE void find_centres(const BlockArrays<A>& block, int m, const Units<A>& units, A order) {
  if constexpr (std::is_same_v<A, float>) {
    if (units.channels % 32 == 0) {
      MmaScores(block, m, units, order).run();
      return;
    }
  }
  find_centres_by_fma(block, m, units, order);
}

}  // namespace frd
