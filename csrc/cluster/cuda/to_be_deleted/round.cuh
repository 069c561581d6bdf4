// One round of clustering of one item by the blocks of a team: each pools and finishes a contiguous range of
// the centres, and assigns and sums up a contiguous range of the tokens.
#pragma once
#include "cluster/cuda/to_be_deleted/scores.cuh"

namespace frd {

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
  __device__ void pool() {
    for (int first = own_centres_.begin; first < own_centres_.end; first += kTileRows)
      pool_tile(first, rows_left(first, own_centres_));
  }

  __device__ void assign() {
    const int centres = r_.centres();
    fill_block(block_.sums, static_cast<int64_t>(centres) * channels_, A(0));
    fill_block(block_.masses, centres, A(0));
    fill_block(block_.tallies, centres, A(0));
    for (int first = own_tokens_.begin; first < own_tokens_.end; first += kTileRows)
      assign_tile(first, rows_left(first, own_tokens_));
  }

  __device__ void finish() {
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
  // To be called between steps that have their own large demand for registers.
  __device__ void renew() { forget(channels_), forget(pitch_), forget(saved_); }

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

  __device__ void pool_tile(int first, int m) {
    const SavedRound& s = r_.saved;
    with_tokens(a_.values, [&](const auto& rows) {
      pool_rows(rows, first, m, block_.values, saved_ + s.inv_bin_count + first);
    });
    __syncthreads();
    store_tile<A>(block_.values, pitch_, first, m, channels_, {saved_ + s.pooled, channels_, 1});
    if (!a_.shared) {
      with_tokens(a_.keys, [&](const auto& rows) {
        pool_rows(rows, first, m, block_.keys, saved_ + s.inv_bin_count + first);
      });
      __syncthreads();
    }
    make_keys<3>(m, saved_ + s.unit_inv_norm + first);
    store_tile<A>(block_.keys, pitch_, first, m, channels_, {saved_ + s.unit, channels_, 1});
    __syncthreads();
  }

  // The keys of a tile of tokens, divided by their norms, in block_.keys; scale [m] = 1 / norms. Tokens are
  // in block_.values, or in block_.keys where keys have their own.
  // kParts: as for rows_times_weight
  template <int kParts>
  __device__ void make_keys(int m, A* scale) {
    renew();
    const A* from = block_.keys;
    if (r_.key_weight != nullptr)
      rows_times_weight<true, T, kParts>(block_.values, pitch_, m, static_cast<const T*>(r_.key_weight),
                                         channels_, block_.keys, pitch_, block_.product);
    else if (a_.shared)
      from = block_.values;
    renew();
    const T* bias = static_cast<const T*>(r_.key_bias);
    for (int i = warp_of_block(); i < m; i += kTeamWarps) {
      A* key = block_.keys + i * pitch_;
      A square = 0;
      for (int c = lane_of_warp(); c < channels_; c += 32) {
        const A v = from[i * pitch_ + c] + (bias != nullptr ? load(bias[c]) : A(0));
        key[c] = v;
        square += v * v;
      }
      const A inverse = inverse_norm(sqrt(warp_sum(square)));
      for (int c = lane_of_warp(); c < channels_; c += 32) key[c] *= inverse;
      if (lane_of_warp() == 0) scale[i] = inverse;
    }
    __syncthreads();
  }

  __device__ void assign_tile(int first, int m) {
    __syncthreads();
    with_tokens(a_.values,
                [&](const auto& rows) { load_tile(rows, first, m, channels_, block_.values, pitch_); });
    if (!a_.shared)
      with_tokens(a_.keys,
                  [&](const auto& rows) { load_tile(rows, first, m, channels_, block_.keys, pitch_); });
    __syncthreads();
    if (t_ == 0)
      make_keys<1>(m, block_.scale);
    else
      make_keys<3>(m, block_.scale);
    renew();
    const Units<A> units{saved_ + r_.saved.unit, saved_ + r_.saved.unit_inv_norm, r_.centres(), channels_};
    find_centres(block_, m, units, order_);
    renew();
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

  __device__ void publish_token(int first, int i) const {
    const int token = first + i;
    const int64_t item = Blocks::item();
    const bool part = takes_part(token);
    const A cosine = part ? block_.cosine[i] : A(0), weight = part ? token_weight(cosine) : A(0);
    const int32_t label = part ? block_.label[i] : -1;
    block_.label[i] = label, block_.weight[i] = weight;
    a_.labels[item * a_.label_stride + r_.labels + token] = label;
    saved_[r_.saved.cosine + token] = cosine;
    saved_[r_.saved.inv_norm + token] = part ? block_.scale[i] : A(0);
    if (a_.similarity != nullptr)
      static_cast<A*>(a_.similarity)[item * r_.tokens() + token] = a_.weighted ? weight : cosine;
  }

  // Where another block of the team has what this one has at `own`, one of the sums.
  __device__ const A* of_block(A* own, int rank) const {
    if (a_.plan.sums_shared) return Blocks::peer(own, rank);
    return own + (rank - Blocks::rank()) * a_.workspace_stride;
  }

  __device__ void finish_tile(int first, int m) {
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
        saved_[s.weight_sum + centre] = mass;
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

  __device__ const A* project_mean(int m) {
    renew();
    rows_times_weight<true>(block_.values, pitch_, m, static_cast<const T*>(r_.value_weight), channels_,
                            block_.keys, pitch_, block_.product);
    renew();
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
