// Rounds 2 to T of an item by one block, from Z alone: the fast form, for T = 3 and few centres.
#include "cluster/cuda/chain_late_general.cuh"
#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

constexpr int kLateThreads = 512, kLateWarps = kLateThreads / 32;
// Most centres of the rounds 1, 2 and 3, and channels.
constexpr int kLateFirst = 64, kLateSecond = 16, kLateThird = 4, kLateChannels = 256;

// A lane's channels of a row: 4 lane .. and 128 + 4 lane ..; zeros beyond the row.
struct LaneRow {
  float v[8];
  __device__ static LaneRow zeros() { return {}; }
  // f(channel, index in v) for the groups of 4 within the row
  template <class F>
  __device__ static void for_groups(int channels, const F& f) {
    FRD_UNROLL
    for (int g = 0; g < 2; ++g)
      if (const int c = 128 * g + 4 * lane_of_warp(); c < channels) f(c, 4 * g);
  }
  __device__ void add(const float* row, int channels, float factor = 1.f) {
    for_groups(channels, [&](int c, int i) {
      const float4 u = *reinterpret_cast<const float4*>(row + c);
      v[i] += factor * u.x, v[i + 1] += factor * u.y, v[i + 2] += factor * u.z, v[i + 3] += factor * u.w;
    });
  }
  __device__ void times(float factor) {
    FRD_UNROLL
    for (float& u : v) u *= factor;
  }
  __device__ float dot(const LaneRow& other) const {
    float sum = 0;
    FRD_UNROLL
    for (int i = 0; i < 8; ++i) sum += v[i] * other.v[i];
    return sum;
  }
  __device__ void write(float* row, int channels) const {
    for_groups(channels, [&](int c, int i) {
      *reinterpret_cast<float4*>(row + c) = {v[i], v[i + 1], v[i + 2], v[i + 3]};
    });
  }
};

// 1 / norm of the row that the warp's lanes hold, in every lane.
FRD_DEVICE float inverse_norm_of(const LaneRow& row) { return inverse_norm(sqrtf(warp_sum(row.dot(row)))); }

// v as two numbers of TF32, rounded to nearest; the second one is NaN where v is.
FRD_DEVICE void split_tf32(float v, uint32_t& high, uint32_t& low) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  high = (bits + 0x1000u) & 0xffffe000u;
  float rounded;
  memcpy(&rounded, &high, 4);
  const float rest = v - rounded;
  memcpy(&low, &rest, 4);
}

// Arrays of a block in shared memory. Rows of keys have a pitch that keeps the banks of 8 rows apart.
struct LateShared {
  float *key, *centre;  // [64, pitch] keys of round 2; [16, pitch] their bin means
  float *rows, *third;  // once those have been compared: [16, 2 C] of round 2; [4, C] its keys' bin means
  float* cosines;       // [4, 64, 16] partial dots of round 2; the first become its cosines
  float *key_scale, *weight, *centre_scale;     // of round 2: [64], [64], [16]
  float *key_scale3, *weight3, *centre_scale3;  // [16], [16], [4]
  float* cosines3;                              // [16, 4]
  int32_t *label, *label3;                      // [64], [16]
  float* late;                                  // [64, 2 C], where they fit: the rest of Z

  static FRD_HD int pitch(int channels) { return channels + 4; }
  static FRD_HD int bytes(int channels, bool staged) {
    const int keys = (kLateFirst + kLateSecond) * pitch(channels), cosines = 4 * kLateFirst * kLateSecond;
    const int small = 3 * kLateFirst + 4 * kLateSecond + kLateThird + kLateSecond * kLateThird;
    return 4 * (keys + cosines + small + (staged ? kLateFirst * 2 * channels : 0));
  }
  __device__ LateShared(float* memory, int channels) {
    const auto take = [&](int floats) {
      float* const at = memory;
      memory += floats;
      return at;
    };
    key = take(kLateFirst * pitch(channels)), centre = take(kLateSecond * pitch(channels));
    rows = key, third = key + kLateSecond * 2 * channels;
    cosines = take(4 * kLateFirst * kLateSecond);
    key_scale = take(kLateFirst), weight = take(kLateFirst), centre_scale = take(kLateSecond);
    key_scale3 = take(kLateSecond), weight3 = take(kLateSecond), centre_scale3 = take(kLateThird);
    cosines3 = take(kLateSecond * kLateThird);
    label = reinterpret_cast<int32_t*>(take(kLateFirst));
    label3 = reinterpret_cast<int32_t*>(take(kLateSecond));
    late = memory;
  }
};

// Tokens of a label among 64, as bits. For a whole warp.
FRD_DEVICE uint64_t members(const int32_t* labels, int tokens, int o) {
  const int lane = lane_of_warp();
  const unsigned low = __ballot_sync(0xffffffffu, lane < tokens && labels[lane] == o);
  const unsigned high = __ballot_sync(0xffffffffu, lane + 32 < tokens && labels[lane + 32] == o);
  return static_cast<uint64_t>(high) << 32 | low;
}
// Calls f(token) in ascending order.
template <class F>
FRD_DEVICE void for_members(uint64_t mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) {
    const unsigned low = static_cast<unsigned>(mask);
    f(low != 0 ? lowest_bit(low) : 32 + lowest_bit(static_cast<unsigned>(mask >> 32)));
  }
}

// The fast form. kStaged: all of Z is in shared memory at once.
template <bool kStaged>
class LateRounds {
 public:
  __device__ LateRounds(const Forward& args, float* memory)
      : a_(args),
        s_(memory, args.channels),
        channels_(args.channels),
        saved_(args.saved + blockIdx.x * args.at.size),
        labels_(args.labels + blockIdx.x * args.label_stride),
        z_(saved_ + args.at.round[0].rows),
        links_(args.links + blockIdx.x * args.link_stride) {}

  __device__ void run() const {
    fetch();
    scale_keys();
    pool_keys();
    __syncthreads();
    multiply_keys();
    cp_async_wait<0>();
    __syncthreads();
    assign_keys();
    __syncthreads();
    aggregate_rows();
    __syncthreads();
    pool_third();
    __syncthreads();
    assign_third();
    __syncthreads();
    aggregate_last();
    link();
  }

 private:
  // Z to shared memory: the keys of round 2, which are awaited, and the rest.
  __device__ void fetch() const {
    const int tokens = a_.round[1].tokens(), pitch = LateShared::pitch(channels_), groups = channels_ / 4;
    for (int i = threadIdx.x; i < tokens * groups; i += kLateThreads) {
      const int r = i / groups, c = i % groups * 4;
      cp_async_16(s_.key + r * pitch + c, z_ + r * 3 * channels_ + c, 16);
    }
    cp_async_commit();
    if (kStaged)
      for (int i = threadIdx.x; i < tokens * 2 * groups; i += kLateThreads) {
        const int r = i / (2 * groups), c = i % (2 * groups) * 4;
        cp_async_16(s_.late + r * 2 * channels_ + c, z_ + (r * 3 + 1) * channels_ + c, 16);
      }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
  }

  // Row r of Z's columns for the rounds after the second, [2 C].
  __device__ const float* late_row(int r) const {
    return kStaged ? s_.late + r * 2 * channels_ : z_ + (r * 3 + 1) * channels_;
  }

  // inv_norm of round 2
  __device__ void scale_keys() const {
    const int tokens = a_.round[1].tokens(), pitch = LateShared::pitch(channels_);
    for (int r = warp_of_block(); r < tokens; r += kLateWarps) {
      LaneRow row = LaneRow::zeros();
      row.add(s_.key + r * pitch, channels_);
      const float scale = inverse_norm_of(row);
      if (lane_of_warp() == 0) s_.key_scale[r] = saved_[a_.at.round[1].inv_norm + r] = scale;
    }
  }

  // pooled = bin means of the keys of round 2, a centre a warp
  __device__ void pool_keys() const {
    const Round& round = a_.round[1];
    const int o = warp_of_block(), pitch = LateShared::pitch(channels_);
    if (o >= round.centres()) return;
    const Bin bin = bin_of(round, o);
    LaneRow row = LaneRow::zeros();
    for_tokens(bin, round.width, [&](int n) { row.add(s_.key + n * pitch, channels_); });
    row.times(1.f / static_cast<float>(bin.pixels()));
    row.write(s_.centre + o * pitch, channels_);
    row.write(saved_ + a_.at.round[1].pooled + o * channels_, channels_);
    const float scale = inverse_norm_of(row);
    if (lane_of_warp() == 0) s_.centre_scale[o] = saved_[a_.at.round[1].pooled_inv_norm + o] = scale;
  }

  // cosines [4, 64, 16] = (key / |key|) . (centre / |centre|) over a quarter of the channels; a warp has 16
  // keys of a quarter. Rows are scaled before the product: a norm may be infinite where no element is.
  __device__ void multiply_keys() const {
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, pitch = LateShared::pitch(channels_);
    const int row = warp_of_block() % 4 * 16, quarter = warp_of_block() / 4;
    if (row >= a_.round[1].tokens()) return;
    const float scale[2] = {s_.key_scale[row + g], s_.key_scale[row + 8 + g]};
    const float centre_scale[2] = {s_.centre_scale[g], s_.centre_scale[8 + g]};
    float sum[2][4] = {}, rest[2][4] = {};
#pragma unroll 2
    for (int c = quarter * 8; c < channels_; c += 32) {
      uint32_t high[4], low[4];
      FRD_UNROLL
      for (int i = 0; i < 4; ++i)
        split_tf32(scale[i % 2] * s_.key[(row + i % 2 * 8 + g) * pitch + c + i / 2 * 4 + t], high[i], low[i]);
      FRD_UNROLL
      for (int j = 0; j < 2; ++j) {
        uint32_t b[2], b_low[2];
        FRD_UNROLL
        for (int i = 0; i < 2; ++i)
          split_tf32(centre_scale[j] * s_.centre[(8 * j + g) * pitch + c + 4 * i + t], b[i], b_low[i]);
        mma_m16n8k8_tf32(sum[j], high, b[0], b[1]);
        mma_m16n8k8_tf32(rest[j], high, b_low[0], b_low[1]);
        mma_m16n8k8_tf32(rest[j], low, b[0], b[1]);
      }
    }
    float* to = s_.cosines + (quarter * kLateFirst + row) * kLateSecond;
    FRD_UNROLL
    for (int j = 0; j < 2; ++j) FRD_UNROLL
    for (int i = 0; i < 4; ++i)
      to[(g + i / 2 * 8) * kLateSecond + 8 * j + 2 * t + i % 2] = sum[j][i] + rest[j][i];
  }

  // matrix = cosines of round 2; label, cosine and weight of each token, which has four lanes
  __device__ void assign_keys() const {
    const int r = threadIdx.x / 4, part = threadIdx.x % 4, centres = a_.round[1].centres();
    if (threadIdx.x >= 4 * kLateFirst) return;
    const bool inside = r < a_.round[1].tokens();
    const float order = order_of(a_, 1);
    Best best{0.f, Best::kNone};
    FRD_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int o = part * 4 + e;
      if (!inside || o >= centres) continue;
      float* const at = s_.cosines + r * kLateSecond + o;
      constexpr int kQuarter = kLateFirst * kLateSecond;
      const float cosine = (at[0] + at[kQuarter]) + (at[2 * kQuarter] + at[3 * kQuarter]);
      *at = cosine;
      if (a_.dense) saved_[a_.at.round[1].matrix + r * centres + o] = cosine;
      best.meet(order, cosine, o);
    }
    best.meet_lane(order, 1), best.meet_lane(order, 2);
    if (inside && part == 0) publish(1, r, best, s_.label, s_.weight);
  }

  // Label, cosine and weight of a token of round t, numbered from 0.
  __device__ void publish(int t, int n, const Best& best, int32_t* label, float* weight) const {
    label[n] = labels_[a_.round[t].labels + n] = best.centre;
    saved_[a_.at.round[t].cosine + n] = best.cosine;
    weight[n] = a_.weighted ? gate_of(a_, t, best.cosine) : 1.f;
  }

  // 1 / (1 + sum of the weights of the cluster's tokens)
  __device__ float mass_of(uint64_t mask, const float* weight) const {
    float sum = 1.f;
    for_members(mask, [&](int n) { sum += weight[n]; });
    return 1.f / sum;
  }

  // rows [16, 2 C] = (bin mean + sum of the cluster's weight * row) / (1 + sum of weights), a centre a warp
  __device__ void aggregate_rows() const {
    const Round& round = a_.round[1];
    const int o = warp_of_block();
    if (o >= round.centres()) return;
    const Bin bin = bin_of(round, o);
    const uint64_t mask = members(s_.label, round.tokens(), o);
    const float share = 1.f / static_cast<float>(bin.pixels()), scale = mass_of(mask, s_.weight);
    LaneRow key = LaneRow::zeros(), value = LaneRow::zeros();
    for_tokens(bin, round.width, [&](int n) {
      key.add(late_row(n), channels_), value.add(late_row(n) + channels_, channels_);
    });
    key.times(share), value.times(share);
    for_members(mask, [&](int n) {
      key.add(late_row(n), channels_, s_.weight[n]);
      value.add(late_row(n) + channels_, channels_, s_.weight[n]);
    });
    key.times(scale), value.times(scale);
    float* const to = saved_ + a_.at.round[1].rows + o * 2 * channels_;
    key.write(s_.rows + o * 2 * channels_, channels_), key.write(to, channels_);
    value.write(s_.rows + (o * 2 + 1) * channels_, channels_), value.write(to + channels_, channels_);
    const float key_scale = inverse_norm_of(key);
    if (lane_of_warp() != 0) return;
    saved_[a_.at.round[1].scale + o] = scale;
    s_.key_scale3[o] = saved_[a_.at.round[2].inv_norm + o] = key_scale;
  }

  // pooled = bin means of the keys of round 3, a centre a warp
  __device__ void pool_third() const {
    const Round& round = a_.round[2];
    const int j = warp_of_block();
    if (j >= round.centres()) return;
    const Bin bin = bin_of(round, j);
    LaneRow row = LaneRow::zeros();
    for_tokens(bin, round.width, [&](int n) { row.add(s_.rows + n * 2 * channels_, channels_); });
    row.times(1.f / static_cast<float>(bin.pixels()));
    row.write(s_.third + j * channels_, channels_);
    row.write(saved_ + a_.at.round[2].pooled + j * channels_, channels_);
    const float scale = inverse_norm_of(row);
    if (lane_of_warp() == 0) s_.centre_scale3[j] = saved_[a_.at.round[2].pooled_inv_norm + j] = scale;
  }

  // matrix = cosines of round 3; label, cosine and weight of each token, which has a warp
  __device__ void assign_third() const {
    const int centres = a_.round[2].centres(), n = warp_of_block();
    if (n >= a_.round[2].tokens()) return;
    const float order = order_of(a_, 2);
    LaneRow row = LaneRow::zeros();
    row.add(s_.rows + n * 2 * channels_, channels_);
    row.times(s_.key_scale3[n]);
    Best best{0.f, Best::kNone};
    for (int j = 0; j < centres; ++j) {
      LaneRow centre = LaneRow::zeros();
      centre.add(s_.third + j * channels_, channels_);
      centre.times(s_.centre_scale3[j]);
      const float cosine = warp_sum(row.dot(centre));
      best.meet(order, cosine, j);
      if (lane_of_warp() != 0) continue;
      s_.cosines3[n * kLateThird + j] = cosine;
      if (a_.dense)
        saved_[a_.at.round[2].matrix + n * centres + j] = links_[(a_.round[1].tokens() + n) * centres + j] =
            cosine;
    }
    if (lane_of_warp() == 0) publish(2, n, best, s_.label3, s_.weight3);
  }

  // rows = the last centres, as in aggregate_rows(), a centre a warp
  __device__ void aggregate_last() const {
    const Round& round = a_.round[2];
    const int j = warp_of_block();
    if (j >= round.centres()) return;
    const Bin bin = bin_of(round, j);
    const uint64_t mask = members(s_.label3, round.tokens(), j);
    const float scale = mass_of(mask, s_.weight3);
    LaneRow value = LaneRow::zeros();
    for_tokens(bin, round.width, [&](int n) { value.add(s_.rows + (n * 2 + 1) * channels_, channels_); });
    value.times(1.f / static_cast<float>(bin.pixels()));
    for_members(mask, [&](int n) { value.add(s_.rows + (n * 2 + 1) * channels_, channels_, s_.weight3[n]); });
    value.times(scale);
    value.write(saved_ + a_.at.round[2].rows + j * channels_, channels_);
    if (lane_of_warp() == 0) saved_[a_.at.round[2].scale + j] = scale;
  }

  // links: dense, the product of both rounds' cosines [64, J]; else the chains' weights and last centres
  __device__ void link() const {
    const int tokens = a_.round[1].tokens(), centres = a_.round[1].centres(), last = a_.round[2].centres();
    if (!a_.dense) {
      const int r = threadIdx.x;
      if (r >= tokens) return;
      links_[r] = s_.weight[r] * s_.weight3[s_.label[r]];
      reinterpret_cast<int32_t*>(links_)[tokens + r] = s_.label3[s_.label[r]];
      return;
    }
    for (int i = threadIdx.x; i < tokens * last; i += kLateThreads) {
      const int r = i / last, j = i % last;
      float sum = 0;
      for (int o = 0; o < centres; ++o)
        sum += s_.cosines[r * kLateSecond + o] * s_.cosines3[o * kLateThird + j];
      links_[i] = sum;
    }
  }

  const Forward& a_;
  LateShared s_;
  int channels_;
  float* saved_;
  int32_t* labels_;
  const float* z_;
  float* links_;
};

template <bool kStaged>
__global__ void __launch_bounds__(kLateThreads, 1) late_kernel(const __grid_constant__ Forward a) {
  FRD_DYNAMIC_SHARED(uint4, shared);
  wait_for_previous();
  let_next_start();
  LateRounds<kStaged>(a, reinterpret_cast<float*>(shared)).run();
}

namespace {

bool is_fast(const Forward& a) {
  return a.count == 3 && a.channels % 8 == 0 && a.channels <= kLateChannels &&
         a.round[0].centres() <= kLateFirst && a.round[1].centres() <= kLateSecond &&
         a.round[2].centres() <= kLateThird;
}

template <bool kStaged>
cudaError_t run_fast(const Forward& a, int bytes, cudaStream_t stream) {
  const auto kernel = late_kernel<kStaged>;
  return FRD_LAUNCH_DEPENDENT(kernel, dim3(static_cast<unsigned>(a.batch)), dim3(kLateThreads), bytes, stream,
                              a);
}

}  // namespace

cudaError_t run_late(const Forward& a, cudaStream_t stream) {
  int limit = 0;
  if (const cudaError_t error = device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return error;
  const int staged = LateShared::bytes(a.channels, true), bytes = LateShared::bytes(a.channels, false);
  if (is_fast(a) && staged <= limit) return run_fast<true>(a, staged, stream);
  if (is_fast(a) && bytes <= limit) return run_fast<false>(a, bytes, stream);
  return FRD_LAUNCH_DEPENDENT(late_general_kernel, dim3(static_cast<unsigned>(a.batch)),
                              dim3(kGeneralThreads), 0, stream, a);
}

}  // namespace chain
}  // namespace frd
