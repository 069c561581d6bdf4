// Rounds 2 to T of an item by one block, from Z alone: for any number of rounds, centres and channels.
#pragma once
#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

constexpr int kGeneralThreads = 512, kGeneralWarps = kGeneralThreads / 32;

class GeneralRounds {
 public:
  __device__ explicit GeneralRounds(const Forward& args)
      : a_(args),
        channels_(args.channels),
        saved_(args.saved + blockIdx.x * args.at.size),
        labels_(args.labels + blockIdx.x * args.label_stride),
        links_(args.links + blockIdx.x * args.link_stride) {}

  __device__ void run() const {
    for (int t = 1; t < a_.count; ++t) {
      scale_keys(t);
      pool_keys(t);
      __syncthreads();
      assign(t);
      __syncthreads();
      aggregate(t);
      __syncthreads();
    }
    if (a_.dense)
      multiply_matrices();
    else
      follow_chains();
  }

 private:
  // Rows of what round t, numbered from 0, clusters: its keys in the first C columns, its values behind them.
  __device__ int64_t width(int t) const { return static_cast<int64_t>(a_.count - t + 1) * channels_; }
  __device__ const float* row(int t, int n) const { return saved_ + a_.at.round[t - 1].rows + n * width(t); }
  __device__ float* pooled(int t, int o) const {
    return saved_ + a_.at.round[t].pooled + static_cast<int64_t>(o) * channels_;
  }

  // (p scale) . (q scale_q) of C channels, in every lane of a warp
  __device__ float dot(const float* p, float scale, const float* q, float scale_q) const {
    float sum = 0;
#pragma unroll 4
    for (int c = lane_of_warp(); c < channels_; c += 32) sum += p[c] * scale * (q[c] * scale_q);
    return warp_sum(sum);
  }

  // inv_norm = 1 / norm of the key, a token a warp
  __device__ void scale_keys(int t) const {
    for (int n = warp_of_block(); n < a_.round[t].tokens(); n += kGeneralWarps) {
      const float square = dot(row(t, n), 1.f, row(t, n), 1.f);
      if (lane_of_warp() == 0) saved_[a_.at.round[t].inv_norm + n] = inverse_norm(sqrtf(square));
    }
  }

  // pooled = bin means of the keys, a centre a warp
  __device__ void pool_keys(int t) const {
    const Round& round = a_.round[t];
    for (int o = warp_of_block(); o < round.centres(); o += kGeneralWarps) {
      const Bin bin = bin_of(round, o);
      float square = 0;
      for (int c = lane_of_warp(); c < channels_; c += 32) {
        float sum = 0;
        for_tokens(bin, round.width, [&](int n) { sum += row(t, n)[c]; });
        const float mean = sum / static_cast<float>(bin.pixels());
        pooled(t, o)[c] = mean;
        square += mean * mean;
      }
      const float scale = inverse_norm(sqrtf(warp_sum(square)));
      if (lane_of_warp() == 0) saved_[a_.at.round[t].pooled_inv_norm + o] = scale;
    }
  }

  // matrix = cosines; label and cosine of each token, which has a warp
  __device__ void assign(int t) const {
    const SavedRound& at = a_.at.round[t];
    const int centres = a_.round[t].centres();
    const float order = order_of(a_, t);
    for (int n = warp_of_block(); n < a_.round[t].tokens(); n += kGeneralWarps) {
      const float scale = saved_[at.inv_norm + n];
      Best best{0.f, Best::kNone};
      for (int o = 0; o < centres; ++o) {
        const float cosine = dot(row(t, n), scale, pooled(t, o), saved_[at.pooled_inv_norm + o]);
        best.meet(order, cosine, o);
        if (a_.dense && lane_of_warp() == 0)
          saved_[at.matrix + static_cast<int64_t>(n) * centres + o] = cosine;
      }
      if (lane_of_warp() != 0) continue;
      labels_[a_.round[t].labels + n] = best.centre;
      saved_[at.cosine + n] = best.cosine;
    }
  }

  // Weight of a token of round t in its cluster.
  __device__ float weight(int t, int n) const {
    return a_.weighted ? gate_of(a_, t, saved_[a_.at.round[t].cosine + n]) : 1.f;
  }

  // Calls f(token) for the cluster's tokens, in ascending order. For a whole warp.
  template <class F>
  __device__ void for_cluster(int t, int o, const F& f) const {
    const int32_t* labels = labels_ + a_.round[t].labels;
    const int tokens = a_.round[t].tokens();
    for (int first = 0; first < tokens; first += 32) {
      const int n = first + lane_of_warp();
      unsigned mask = __ballot_sync(0xffffffffu, n < tokens && labels[n] == o);
      for (; mask != 0; mask &= mask - 1) f(first + lowest_bit(mask));
    }
  }

  // rows = (bin mean + sum of the cluster's weight * value) / (1 + sum of weights), a centre a warp
  __device__ void aggregate(int t) const {
    const Round& round = a_.round[t];
    const int64_t columns = width(t) - channels_;
    for (int o = warp_of_block(); o < round.centres(); o += kGeneralWarps) {
      const Bin bin = bin_of(round, o);
      float mass = 1.f;
      for_cluster(t, o, [&](int n) { mass += weight(t, n); });
      const float scale = 1.f / mass;
      if (lane_of_warp() == 0) saved_[a_.at.round[t].scale + o] = scale;
      for (int64_t first = 0; first < columns; first += 32) {
        const int64_t c = first + lane_of_warp() < columns ? first + lane_of_warp() : 0;
        float sum = 0;
        for_tokens(bin, round.width, [&](int n) { sum += row(t, n)[channels_ + c]; });
        sum /= static_cast<float>(bin.pixels());
        for_cluster(t, o, [&](int n) { sum += weight(t, n) * row(t, n)[channels_ + c]; });
        if (first + lane_of_warp() < columns) saved_[a_.at.round[t].rows + o * columns + c] = scale * sum;
      }
    }
  }

  // links [O_t, J] = matrix [O_t, O_(t+1)] links of the round behind, from the last round on
  __device__ void multiply_matrices() const {
    const int last = a_.round[a_.count - 1].centres();
    int64_t begin = 0;
    for (int t = 1; t < a_.count - 1; ++t) begin += static_cast<int64_t>(a_.round[t].tokens()) * last;
    for (int t = a_.count - 1; t >= 1; --t) {
      const int64_t size = static_cast<int64_t>(a_.round[t].tokens()) * last, behind = begin + size;
      const int centres = a_.round[t].centres();
      for (int64_t i = threadIdx.x; i < size; i += kGeneralThreads) {
        const float* matrix = saved_ + a_.at.round[t].matrix + i / last * centres;
        float sum = t == a_.count - 1 ? matrix[i % last] : 0.f;
        if (t < a_.count - 1)
          for (int o = 0; o < centres; ++o)
            sum += matrix[o] * links_[behind + static_cast<int64_t>(o) * last + i % last];
        links_[begin + i] = sum;
      }
      if (t > 1) begin -= static_cast<int64_t>(a_.round[t - 1].tokens()) * last;
      __syncthreads();
    }
  }

  // links = product of the similarities along the chain of centres that begins at one of round 1, and its end
  __device__ void follow_chains() const {
    const int tokens = a_.round[1].tokens();
    for (int n = threadIdx.x; n < tokens; n += kGeneralThreads) {
      float product = 1.f;
      int at = n;
      for (int t = 1; t < a_.count; ++t) {
        product *= weight(t, at);
        at = labels_[a_.round[t].labels + at];
      }
      links_[n] = product;
      reinterpret_cast<int32_t*>(links_)[tokens + n] = at;
    }
  }

  const Forward& a_;
  int channels_;
  float* saved_;
  int32_t* labels_;
  float* links_;
};

__global__ void __launch_bounds__(kGeneralThreads) late_general_kernel(const __grid_constant__ Forward a) {
  wait_for_previous();
  let_next_start();
  GeneralRounds(a).run();
}

}  // namespace chain
}  // namespace frd
