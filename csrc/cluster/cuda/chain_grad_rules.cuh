// What the kernels of the chain's backward share.
#pragma once
#include "cluster/cuda/chain_grad.h"
#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

// The inverse norm of a row, 0 if it passes no gradient.
FRD_DEVICE float if_live(float inverse) { return is_live(inverse) ? inverse : 0.f; }

// The derivative of the sigmoid, without the cancellation in g (1 - g) of a g near 1.
FRD_DEVICE float sigmoid_slope(float v) {
  const float e = expf(-fabsf(v));
  return e / ((1.f + e) * (1.f + e));
}

// The product of the weights of the rounds from t on (from 0) along the labels, from token `at` of round t,
// and the last centre, in which they end.
struct LabelChain {
  float weight;
  int last;
};
FRD_DEVICE LabelChain follow(const GradArgs& a, int64_t item, int t, int at) {
  float weight = 1;
#pragma unroll 1
  for (; t < a.count; ++t) {
    const float cosine = a.saved[item * a.layout.size + a.layout.round[t].cosine + at];
    weight *= sigmoid(a.beta[t] + a.alpha[t] * cosine);
    at = a.labels[item * a.label_stride + a.round[t].labels + at];
  }
  return {weight, at};
}

// The warps that share the result of a piece of work: of the block, or of all blocks of the item.
struct Warps {
  int own, count;
};

// give(j, c, sum over n < count of left(n, j) right(n, c)) for j < rows and c < width, 8 columns a warp.
template <class L, class R, class G>
FRD_DEVICE void narrow_product(Warps warps, int count, int rows, int width, const L& left, const R& right,
                               const G& give) {
  constexpr int kRows = 4;
  const int part = lane_of_warp() / 8;
#pragma unroll 1
  for (int j0 = 0; j0 < rows; j0 += kRows)
#pragma unroll 1
    for (int begin = warps.own * 8; begin < width; begin += warps.count * 8) {
      const int c = begin + lane_of_warp() % 8, left_over = rows - j0;
      float sum[kRows] = {};
#pragma unroll 8
      for (int n = part; n < count; n += 4) {
        const float value = c < width ? right(n, c) : 0.f;
        FRD_UNROLL
        for (int j = 0; j < kRows; ++j)
          if (j < left_over) sum[j] += left(n, j0 + j) * value;
      }
      FRD_UNROLL
      for (float& v : sum) {
        v += __shfl_xor_sync(0xffffffffu, v, 8);
        v += __shfl_xor_sync(0xffffffffu, v, 16);
      }
      FRD_UNROLL
      for (int j = 0; j < kRows; ++j)
        if (part == 0 && c < width && j < left_over) give(j0 + j, c, sum[j]);
    }
}

// to [2] = the block's sums of (alpha, beta), of the lanes of each of kWarps warps; ends with all threads.
template <int kWarps>
FRD_DEVICE void give_gates(double alpha, double beta, float* to) {
  __shared__ double sums[2][kWarps];
  alpha = warp_sum(alpha), beta = warp_sum(beta);
  if (lane_of_warp() == 0) sums[0][warp_of_block()] = alpha, sums[1][warp_of_block()] = beta;
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[threadIdx.x][w];
    to[threadIdx.x] = static_cast<float>(sum);
  }
  __syncthreads();
}

}  // namespace chain
}  // namespace frd
