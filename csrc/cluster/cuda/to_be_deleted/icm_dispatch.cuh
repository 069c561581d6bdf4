// From the centres of the last round back to the tokens, by the blocks of a team.
#pragma once
#include "cluster/cuda/to_be_deleted/round.cuh"

namespace frd {

template <class T, int kBlocks>
class TeamDispatch {
 public:
  using A = compute_t<T>;
  using Blocks = Team<kBlocks>;

  __device__ TeamDispatch(const IcmArgs& args, const BlockArrays<A>& arrays)
      : a_(args),
        block_(arrays),
        channels_(args.channels),
        pitch_(tile_pitch(args.channels)),
        saved_(static_cast<A*>(args.saved) + Blocks::item() * args.saved_stride),
        labels_(args.labels + Blocks::item() * args.label_stride),
        last_(saved_ + args.round[args.count - 1].saved.result),
        own_channels_(range_of(args.channels, kBlocks, Blocks::rank())),
        own_tokens_(range_of(args.round[0].tokens(), kBlocks, Blocks::rank())) {}

  // Released: the product of the similarities along a token's chain of centres, times the last centre.
  __device__ void masked() const {
    for (int first = own_tokens_.begin; first < own_tokens_.end; first += kTileRows) {
      const int m = rows_left(first);
      __syncthreads();
      if (threadIdx.x < m)
        follow_chain(first + threadIdx.x, block_.weight[threadIdx.x], block_.label[threadIdx.x]);
      __syncthreads();
      for_tile(m, channels_, false, [&](int i, int c) {
        block_.values[i * pitch_ + c] =
            block_.weight[i] * last_[static_cast<int64_t>(block_.label[i]) * channels_ + c];
      });
      __syncthreads();
      store_tile<T>(block_.values, pitch_, first, m, channels_, rows_of<T>(a_.out, Blocks::item()));
    }
  }

  // Paper: sigmoid(alpha * S + beta) R, with the product S [N, J] of the rounds' cosines made from the right,
  // the first round's token by token.
  __device__ void dense() const {
    for (int t = a_.count - 1; t >= 0; --t) {
      if (t < a_.count - 1) {
        make_query(t);
        Blocks::sync();
      }
      project_query(t);
      Blocks::sync();
      if (t == 0) break;
      make_product(t);
      Blocks::sync();
    }
    const A alpha = *static_cast<const A*>(a_.alpha), beta = *static_cast<const A*>(a_.beta);
    for (int first = own_tokens_.begin; first < own_tokens_.end; first += kTileRows)
      dense_tile(first, rows_left(first), alpha, beta);
  }

 private:
  __device__ int rows_left(int first) const {
    return own_tokens_.end - first < kTileRows ? own_tokens_.end - first : kTileRows;
  }

  __device__ A similarity(int t, int token) const {
    const A cosine = saved_[a_.round[t].saved.cosine + token];
    return team_sigmoid(static_cast<const A*>(a_.beta)[t] + static_cast<const A*>(a_.alpha)[t] * cosine);
  }

  __device__ void follow_chain(int token, A& weight, int32_t& centre) const {
    A chain = 1;
    int32_t at = labels_[token];
    for (int t = 1; t < a_.count; ++t) {
      chain *= similarity(t, at);
      at = labels_[a_.round[t].labels + at];
    }
    weight = similarity(0, token) * chain;
    centre = at;
  }

  // What the unit keys of round t are multiplied with, [J, C].
  __device__ const A* query(int t) const {
    const SavedRound& s = a_.round[t].saved;
    return saved_ + (t == a_.count - 1 ? s.unit : s.query);
  }

  // query [J, C], this block's channels = product of the next round [O, J]^T * unit [O, C]
  __device__ void make_query(int t) const {
    const RoundArgs& r = a_.round[t];
    const int size = own_channels_.size();
    for (int i = threadIdx.x; i < a_.columns * size; i += kTeamThreads) {
      const int j = i / size, c = own_channels_.begin + i % size;
      const A* weight = saved_ + a_.round[t + 1].saved.product + j;
      const A* unit = saved_ + r.saved.unit + c;
      A sum = 0;
#pragma unroll 8
      for (int o = 0; o < r.centres(); ++o)
        sum += weight[static_cast<int64_t>(o) * a_.columns] * unit[static_cast<int64_t>(o) * channels_];
      saved_[r.saved.query + static_cast<int64_t>(j) * channels_ + c] = sum;
    }
  }

  // projected [J, C], this block's channels = query * Wk; offset [J] = query . bk, shared among the blocks
  __device__ void project_query(int t) const {
    const RoundArgs& r = a_.round[t];
    const A* from = query(t);
    const int size = own_channels_.size();
    if (t == a_.count - 1 || r.key_weight == nullptr)
      for (int i = threadIdx.x; i < a_.columns * size; i += kTeamThreads) {
        const int64_t at = static_cast<int64_t>(i / size) * channels_ + own_channels_.begin + i % size;
        if (t == a_.count - 1) saved_[r.saved.query + at] = from[at];
        if (r.key_weight == nullptr) saved_[r.saved.projected + at] = from[at];
      }
    const T* bias = static_cast<const T*>(r.key_bias);
    for (int j = Blocks::rank() * kTeamWarps + warp_of_block(); j < a_.columns; j += kBlocks * kTeamWarps) {
      A sum = 0;
      for (int c = lane_of_warp(); bias != nullptr && c < channels_; c += 32)
        sum += from[static_cast<int64_t>(j) * channels_ + c] * load(bias[c]);
      sum = warp_sum(sum);
      if (lane_of_warp() == 0) saved_[r.saved.offset + j] = sum;
    }
    if (r.key_weight == nullptr) return;
    for (int c = own_channels_.begin; c < own_channels_.end; c += kTeamThreads)
      for (int j = 0; j < a_.columns; j += 4) project_columns(r, from, j, c);
  }

  // Four rows and up to kTeamThreads channels of `projected`: threads split the reduction where there are
  // fewer.
  __device__ void project_columns(const RoundArgs& r, const A* from, int first_row, int first) const {
    const int left = own_channels_.end - first, n = left < kTeamThreads ? left : kTeamThreads;
    const int parts = kTeamThreads / n, part = static_cast<int>(threadIdx.x) / n, c = threadIdx.x % n;
    const int rows = a_.columns - first_row < 4 ? a_.columns - first_row : 4;
    from += static_cast<int64_t>(first_row) * channels_;
    if (part < parts) {
      const Range range = range_of(channels_, parts, part);
      const T* weight = static_cast<const T*>(r.key_weight) + first + c;
      A sum[4] = {0, 0, 0, 0};
#pragma unroll 8
      for (int o = range.begin; o < range.end; ++o) {
        const A w = load(weight[static_cast<int64_t>(o) * channels_]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += from[(j < rows ? j : 0) * channels_ + o] * w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) block_.product[(part * 4 + j) * n + c] = sum[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * n; i += kTeamThreads) {
      A sum = 0;
      for (int p = 0; p < parts; ++p) sum += block_.product[p * 4 * n + i];
      saved_[r.saved.projected + static_cast<int64_t>(first_row + i / n) * channels_ + first + i % n] = sum;
    }
    __syncthreads();
  }

  // Row j of the product of the cosines of the rounds from t on, for a token [C]; in every lane of a warp.
  __device__ A product(int t, const A* token, A scale, int j) const {
    const SavedRound& s = a_.round[t].saved;
    const A* projected = saved_ + s.projected + static_cast<int64_t>(j) * channels_;
    return scale * (warp_dot(token, projected, channels_) + saved_[s.offset + j]);
  }

  // product [tokens, J] of the block's tokens of round t >= 1
  __device__ void make_product(int t) const {
    const RoundArgs& r = a_.round[t];
    const Range tokens = range_of(r.tokens(), kBlocks, Blocks::rank());
    const A* from = saved_ + a_.round[t - 1].saved.result;
    for (int n = tokens.begin + warp_of_block(); n < tokens.end; n += kTeamWarps)
      for (int j = 0; j < a_.columns; ++j) {
        const A v = product(t, from + static_cast<int64_t>(n) * channels_, saved_[r.saved.inv_norm + n], j);
        if (lane_of_warp() == 0) saved_[r.saved.product + static_cast<int64_t>(n) * a_.columns + j] = v;
      }
  }

  __device__ void dense_tile(int first, int m, A alpha, A beta) const {
    constexpr int kGates = 32;
    A* gate = block_.product;  // [kTileRows, kGates]
    __syncthreads();
    load_tile(rows_of<T>(a_.values, Blocks::item()), first, m, channels_, block_.values, pitch_);
    for (int begin = 0; begin < a_.columns; begin += kGates) {
      const int count = a_.columns - begin < kGates ? a_.columns - begin : kGates;
      __syncthreads();
      for (int i = warp_of_block(); i < m; i += kTeamWarps)
        for (int j = 0; j < count; ++j) {
          const A scale = saved_[a_.round[0].saved.inv_norm + first + i];
          const A v = product(0, block_.values + i * pitch_, scale, begin + j);
          if (lane_of_warp() == 0) gate[i * kGates + j] = team_sigmoid(alpha * v + beta);
        }
      __syncthreads();
      for_tile(m, channels_, false, [&](int i, int c) {
        A sum = begin == 0 ? A(0) : block_.keys[i * pitch_ + c];
        for (int j = 0; j < count; ++j)
          sum += gate[i * kGates + j] * last_[static_cast<int64_t>(begin + j) * channels_ + c];
        block_.keys[i * pitch_ + c] = sum;
      });
    }
    __syncthreads();
    store_tile<T>(block_.keys, pitch_, first, m, channels_, rows_of<T>(a_.out, Blocks::item()));
  }

  const IcmArgs& a_;
  const BlockArrays<A>& block_;
  int channels_, pitch_;
  A* saved_;
  const int32_t* labels_;
  const A* last_;
  Range own_channels_, own_tokens_;
};

}  // namespace frd
