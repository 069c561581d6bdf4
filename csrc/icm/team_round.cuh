// One round of clustering of one item by the blocks of a team: each pools and finishes a contiguous range of
// the centres, and assigns and sums up a contiguous range of the tokens.
#pragma once
#include "icm/team_product.cuh"

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
};

template <class T, int kBlocks>
class TeamRound {
 public:
  using A = compute_t<T>;
  using Blocks = Team<kBlocks>;

  __device__ TeamRound(const IcmArgs& args, const BlockArrays<A>& arrays, int t)
      : a_(args),
        r_(args.round[t]),
        block_(arrays),
        t_(t),
        channels_(args.channels),
        pitch_(tile_pitch(args.channels)),
        saved_(static_cast<A*>(args.saved) + Blocks::item() * args.saved_stride) {
    gate_ = a_.weighted ? t : 0;
    alpha_ = static_cast<const A*>(args.alpha)[gate_], beta_ = static_cast<const A*>(args.beta)[gate_];
    order_ = !a_.ordered ? A(1) : alpha_ > 0 ? A(1) : alpha_ < 0 ? A(-1) : alpha_;
    own_centres_ = range_of(r_.centres(), kBlocks, Blocks::rank());
    own_tokens_ = range_of(r_.tokens(), kBlocks, Blocks::rank());
  }

  // Between the steps lies a sync of the team, and one after the last.
  __device__ void pool() const {
    for (int first = own_centres_.begin; first < own_centres_.end; first += kTileRows)
      pool_tile(first, rows_left(first, own_centres_));
  }

  __device__ void assign() const {
    const int centres = r_.centres();
    fill_block(block_.sums, static_cast<int64_t>(centres) * channels_, A(0));
    fill_block(block_.masses, centres, A(0));
    fill_block(block_.tallies, centres, A(0));
    for (int first = own_tokens_.begin; first < own_tokens_.end; first += kTileRows)
      assign_tile(first, rows_left(first, own_tokens_));
  }

  __device__ void finish() const {
    for (int first = own_centres_.begin; first < own_centres_.end; first += kTileRows)
      finish_tile(first, rows_left(first, own_centres_));
  }

  // Calls f(Rows) with the tokens of this round.
  template <class F>
  __device__ void with_tokens(const TokenView& view, const F& f) const {
    if (t_ == 0)
      f(rows_of<T>(view, Blocks::item()));
    else
      f(Rows<A>{saved_ + a_.round[t_ - 1].saved.result, channels_, 1});
  }

  // The weight of a token in its cluster.
  __device__ A token_weight(A cosine) const {
    return a_.weighted ? team_sigmoid(beta_ + alpha_ * cosine) : A(1);
  }

 private:
  __device__ int rows_left(int first, const Range& range) const {
    return range.end - first < kTileRows ? range.end - first : kTileRows;
  }

  __device__ bool takes_part(int token) const {
    return a_.mask == nullptr || a_.mask[Blocks::item() * a_.mask_batch + token * a_.mask_token];
  }

  // tile [m, pitch] = bin means of the centres first .. first + m; `share` [m]: 1 / tokens of a bin
  template <class U>
  __device__ void pool_rows(const Rows<U>& from, int first, int m, A* tile, A* share) const {
    // neighbouring threads have neighbours in memory
    const bool by_bin = from.channel != 1;
    const int step = by_bin ? kTeamThreads / m : 32, thread = static_cast<int>(threadIdx.x);
    const int start = by_bin ? thread / m : lane_of_warp();
    if (by_bin && start >= step) return;
    for (int i = by_bin ? thread % m : warp_of_block(); i < m; i += by_bin ? m : kTeamWarps) {
      const Bin bin = bin_of(r_, first + i);
      for (int c = start; c < channels_; c += step) {
        A sum = 0;
        int tokens = 0;
        for (int y = bin.top; y < bin.bottom; ++y)
          for (int x = bin.left; x < bin.right; ++x) {
            const int token = y * r_.width + x;
            if (!takes_part(token)) continue;
            sum += load(from.at(token, c));
            ++tokens;
          }
        tile[i * pitch_ + c] = tokens > 0 ? sum / A(tokens) : A(0);
        if (c == 0) share[i] = tokens > 0 ? A(1) / A(tokens) : A(0);
      }
    }
  }

  __device__ void pool_tile(int first, int m) const {
    const SavedRound& s = r_.saved;
    with_tokens(a_.values, [&](const auto& rows) {
      pool_rows(rows, first, m, block_.values, saved_ + s.share + first);
    });
    __syncthreads();
    store_tile<A>(block_.values, pitch_, first, m, channels_, {saved_ + s.pooled, channels_, 1});
    if (!a_.shared) {
      with_tokens(a_.keys, [&](const auto& rows) {
        pool_rows(rows, first, m, block_.keys, saved_ + s.share + first);
      });
      __syncthreads();
    }
    make_keys(m, saved_ + s.unit_scale + first);
    store_tile<A>(block_.keys, pitch_, first, m, channels_, {saved_ + s.unit, channels_, 1});
    __syncthreads();
  }

  // The keys of a tile of tokens, divided by their norms, in block_.keys; scale [m] = 1 / norms. Tokens are
  // in block_.values, or in block_.keys where keys have their own.
  __device__ void make_keys(int m, A* scale) const {
    const A* from = block_.keys;
    if (r_.key_weight != nullptr)
      rows_times_weight<true>(block_.values, pitch_, m, static_cast<const T*>(r_.key_weight), channels_,
                              block_.keys, pitch_, block_.product);
    else if (a_.shared)
      from = block_.values;
    const T* bias = static_cast<const T*>(r_.key_bias);
    for (int i = warp_of_block(); i < m; i += kTeamWarps) {
      A* key = block_.keys + i * pitch_;
      A square = 0;
      for (int c = lane_of_warp(); c < channels_; c += 32) {
        const A v = from[i * pitch_ + c] + (bias != nullptr ? load(bias[c]) : A(0));
        key[c] = v;
        square += v * v;
      }
      const A inverse = inverse_norm(warp_sum(square));
      for (int c = lane_of_warp(); c < channels_; c += 32) key[c] *= inverse;
      if (lane_of_warp() == 0) scale[i] = inverse;
    }
    __syncthreads();
  }

  __device__ void assign_tile(int first, int m) const {
    __syncthreads();
    with_tokens(a_.values,
                [&](const auto& rows) { load_tile(rows, first, m, channels_, block_.values, pitch_); });
    if (!a_.shared)
      with_tokens(a_.keys,
                  [&](const auto& rows) { load_tile(rows, first, m, channels_, block_.keys, pitch_); });
    __syncthreads();
    make_keys(m, block_.scale);
    find_centres(m);
    __syncthreads();
    if (threadIdx.x < m) publish_token(first, threadIdx.x);
    __syncthreads();
    add_by_label(block_.values, pitch_, m, channels_, block_.label, block_.weight, block_.sums);
    for (int o = threadIdx.x; o < r_.centres(); o += kTeamThreads) {
      A mass = block_.masses[o], tally = block_.tallies[o];
      for (int i = 0; i < m; ++i)
        if (block_.label[i] == o) mass += block_.weight[i], tally += 1;
      block_.masses[o] = mass, block_.tallies[o] = tally;
    }
  }

  // label and cosine of the tile's tokens
  __device__ void find_centres(int m) const {
    const int centres = r_.centres();
    Best<A> best[4];
    FRD_UNROLL
    for (Best<A>& b : best) b = {-A(INFINITY), 0, centres};
    for (int first = 0; first < centres; first += kProductColumns) {
      const MultiplyAdd<true, A, A> scores(block_.keys, pitch_, m, saved_ + r_.saved.unit, channels_, first,
                                           centres, channels_, block_.product);
      FRD_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int centre = first + lane_of_warp() * 4 + j;
        if (centre >= centres) break;
        FRD_UNROLL
        for (int i = 0; i < 4; ++i) best[i].meet(order_ * scores.sum[i][j], scores.sum[i][j], centre);
      }
    }
    FRD_UNROLL
    for (int i = 0; i < 4; ++i) {
      FRD_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        const A score = __shfl_xor_sync(0xffffffffu, best[i].score, step),
                raw = __shfl_xor_sync(0xffffffffu, best[i].raw, step);
        best[i].meet(score, raw, __shfl_xor_sync(0xffffffffu, best[i].centre, step));
      }
      if (const int row = warp_of_block() * 4 + i; lane_of_warp() == 0 && row < m)
        block_.label[row] = best[i].centre, block_.cosine[row] = best[i].raw;
    }
  }

  __device__ void publish_token(int first, int i) const {
    const int token = first + i;
    const int64_t item = Blocks::item();
    const bool part = takes_part(token);
    const A cosine = part ? block_.cosine[i] : A(0), weight = part ? token_weight(cosine) : A(0);
    const int32_t label = part ? block_.label[i] : -1;
    block_.label[i] = label, block_.weight[i] = weight;
    a_.labels[item * a_.label_stride + r_.labels + token] = label;
    saved_[r_.saved.cosine + token] = cosine;
    saved_[r_.saved.scale + token] = part ? block_.scale[i] : A(0);
    if (a_.similarity != nullptr)
      static_cast<A*>(a_.similarity)[item * r_.tokens() + token] = a_.weighted ? weight : cosine;
  }

  // Where another block of the team has what this one has at `own`, one of the sums.
  __device__ const A* of_block(A* own, int rank) const {
    if (a_.plan.sums_shared) return Blocks::peer(own, rank);
    return own + (rank - Blocks::rank()) * a_.workspace_stride;
  }

  __device__ void finish_tile(int first, int m) const {
    const SavedRound& s = r_.saved;
    __syncthreads();
    for (int i = warp_of_block(); i < m; i += kTeamWarps) {
      const int centre = first + i;
      A mass = 1, tally = 0;
      for (int rank = 0; rank < kBlocks; ++rank) {
        mass += of_block(block_.masses, rank)[centre];
        tally += of_block(block_.tallies, rank)[centre];
      }
      for (int c = lane_of_warp(); c < channels_; c += 32) {
        const int64_t at = static_cast<int64_t>(centre) * channels_ + c;
        A sum = saved_[s.pooled + at];
        for (int rank = 0; rank < kBlocks; ++rank) sum += of_block(block_.sums, rank)[at];
        block_.values[i * pitch_ + c] = sum / mass;
      }
      if (lane_of_warp() == 0) {
        saved_[s.mass + centre] = mass;
        if (a_.counts != nullptr)
          a_.counts[Blocks::item() * r_.centres() + centre] = static_cast<int32_t>(tally);
      }
    }
    __syncthreads();
    store_tile<A>(block_.values, pitch_, first, m, channels_, {saved_ + s.mean, channels_, 1});
    const A* result = block_.values;
    if (r_.value_weight != nullptr) result = project_mean(m);
    store_tile<A>(result, pitch_, first, m, channels_, {saved_ + s.result, channels_, 1});
    if (a_.centres.data != nullptr)
      store_tile<T>(result, pitch_, first, m, channels_, rows_of<T>(a_.centres, Blocks::item()));
  }

  __device__ const A* project_mean(int m) const {
    rows_times_weight<true>(block_.values, pitch_, m, static_cast<const T*>(r_.value_weight), channels_,
                            block_.keys, pitch_, block_.product);
    const T* bias = static_cast<const T*>(r_.value_bias);
    for_tile(m, channels_, false, [&](int i, int c) { block_.keys[i * pitch_ + c] += load(bias[c]); });
    __syncthreads();
    return block_.keys;
  }

  const IcmArgs& a_;
  const RoundArgs& r_;
  const BlockArrays<A>& block_;
  int t_, gate_, channels_, pitch_;
  A* saved_;
  A alpha_, beta_, order_;
  Range own_centres_, own_tokens_;
};

}  // namespace frd
