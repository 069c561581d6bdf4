// Gradients of one round by a team: through the key projection, and of the tokens.
#pragma once
#include "cluster/cuda/to_be_deleted/round_grad.cuh"

namespace frd {

// A tile of the block's rows of a projected round: tokens, then centres behind them.
struct MixedTile {
  int rows, of_tokens;  // of which so many are tokens
  int first_token, first_centre;

  __device__ MixedTile(Range tokens, Range centres, int first, int m) : rows(m) {
    const int left = tokens.size() - first;
    of_tokens = left < 0 ? 0 : left < m ? left : m;
    first_token = tokens.begin + first;
    first_centre = centres.begin + (left < 0 ? -left : 0) - of_tokens;  // of row 0
  }
};

// g.outs [m, pitch], keys of the tile's tokens and gradients of its centres' directions but for the biases,
// -> g.rows, gradients of the keys; kept for the gradient of Wk.
template <class T, int kBlocks>
FRD_DEVICE void turn_keys(const GradItem<T, kBlocks>& g, int t, const MixedTile& tile) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const RoundWork& w = g.a.work[t];
  const int channels = g.channels;
  const T* bias = static_cast<const T*>(r.key_bias);
  for_rows(tile.rows, [&](int i) {
    const A* from = g.outs + i * g.pitch;
    A* row = g.rows + i * g.pitch;
    A* kept = g.work + w.key_grad;
    if (i < tile.of_tokens) {
      const int n = tile.first_token + i;
      const TokenPull<T, kBlocks> pull(g, t, n);
      for_runs(channels, [&](int c) {
        A v[kRun];
        load_run(from + c, channels - c, v);
        add_run(A(1), bias + c, channels - c, v);
        pull.turn(c, v);
        store_run(row + c, channels - c, v);
        store_run(kept + int64_t{n} * channels + c, channels - c, v);
      });
      return;
    }
    const int o = tile.first_centre + i, centres = r.centres();
    A pulls = 0;
#pragma unroll 1
    for (int p = 0; !g.a.dense && p < w.parts; ++p) pulls += g.work[w.pulls + p * centres + o];
    for_runs(channels, [&](int c) {
      A v[kRun];
      if (g.a.dense) {
        unit_grad_run(g, t, o, c, v);
      } else {
        load_run(from + c, channels - c, v);
        add_run(pulls, bias + c, channels - c, v);
      }
      store_run(row + c, channels - c, v);
    });
    centre_key_grad(g, t, o, row, row);
    kept += int64_t{r.tokens() + o} * channels;
    for_runs(channels, [&](int c) {
      A v[kRun];
      load_run(row + c, channels - c, v);
      store_run(kept + c, channels - c, v);
    });
  });
}

// g.rows [m, pitch] = the tile's tokens and sums of pull * token.
template <class T, int kBlocks>
FRD_DEVICE void load_mixed(const GradItem<T, kBlocks>& g, int t, const MixedTile& tile) {
  const int channels = g.channels;
  g.keys(t).tile(tile.first_token, tile.of_tokens, g.rows, g.pitch);
  if (g.a.dense) return;
  for_rows(tile.rows - tile.of_tokens, [&](int i) {
    const int row = tile.of_tokens + i;
    for_runs(channels, [&](int c) {
      compute_t<T> v[kRun];
      unit_grad_run(g, t, tile.first_centre + row, c, v);
      store_run(g.rows + row * g.pitch + c, channels - c, v);
    });
  });
}

// token_grad and pooled_grad from g.outs [m, pitch], the gradients of the keys times Wk.
template <class T, int kBlocks>
FRD_DEVICE void give_mixed(const GradItem<T, kBlocks>& g, int t, const MixedTile& tile) {
  using A = compute_t<T>;
  const int channels = g.channels;
  for_rows(tile.rows, [&](int i) {
    const A* from = g.outs + i * g.pitch;
    if (i >= tile.of_tokens) {
      give_pooled_grad(g, t, tile.first_centre + i, from);
      return;
    }
    A* to = g.work + g.a.work[t].token_grad + int64_t{tile.first_token + i} * channels;
    for_runs(channels, [&](int c) {
      A v[kRun];
      load_run(from + c, channels - c, v);
      store_run(to + c, channels - c, v);
    });
  });
}

// Through Wk and back: token_grad [N, C] and pooled_grad [O, C] of the block's tokens and centres.
template <class T, int kBlocks>
FRD_DEVICE void projected_grads(const GradItem<T, kBlocks>& g, int t) {
  const Range tokens = g.own(g.a.round[t].tokens()), centres = g.own(g.a.round[t].centres());
  g.for_tiles({0, tokens.size() + centres.size()}, [&](int first, int m) {
    const MixedTile tile(tokens, centres, first, m);
    int round = t;
    forget(round);
    load_mixed(g.renewed(), round, tile);
    const auto multiply = [&](auto transposed, int rows) {
      const GradItem<T, kBlocks> h = g.renewed();
      rows_times_weight<decltype(transposed)::value, T, kGradParts>(
          h.rows, h.pitch, rows, static_cast<const T*>(h.a.round[t].key_weight), h.channels, h.outs, h.pitch,
          h.scratch);
    };
    multiply(std::true_type{}, g.a.dense ? tile.of_tokens : m);
    forget(round);
    turn_keys(g.renewed(), round, tile);
    multiply(std::false_type{}, m);
    forget(round);
    give_mixed(g.renewed(), round, tile);
  });
}

// The bins that cover a token.
struct TokenBins {
  int top, bottom, left, right;  // inclusive

  __device__ TokenBins(const RoundArgs& r, int n) {
    const int y = n / r.width, x = n - y * r.width;
    top = static_cast<int>(first_bin(y, r.height, r.rows));
    bottom = static_cast<int>(last_bin(y, r.height, r.rows));
    left = static_cast<int>(first_bin(x, r.width, r.columns));
    right = static_cast<int>(last_bin(x, r.width, r.columns));
  }
  // v += the run at channel c of what the bins pass on of bins [O, C], the gradients of their means
  template <class A>
  __device__ void add(const RoundArgs& r, const A* share, const A* bins, int channels, int c,
                      A (&v)[kRun]) const {
#pragma unroll 1
    for (int i = top; i <= bottom; ++i)
#pragma unroll 1
      for (int j = left; j <= right; ++j) {
        const int bin = i * r.columns + j;
        add_run(share[bin], bins + int64_t{bin} * channels + c, channels - c, v);
      }
  }
};

// g.outs [m, pitch] = the gradients of the values of the tokens first .. first + m.
template <class T, int kBlocks>
FRD_DEVICE void value_grads(const GradItem<T, kBlocks>& g, int t, int first, int m) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const A* mean_grad = g.work + g.a.work[t].mean_grad;
  const int channels = g.channels;
  for_rows(m, [&](int i) {
    const int n = first + i, label = g.labels_of(t)[n];
    const A weight = label < 0 ? A(0) : g.weight_of(t, g.saved[r.saved.cosine + n]);
    const TokenBins bins(r, n);
    for_runs(channels, [&](int c) {
      A v[kRun] = {};
      if (label >= 0) {
        add_run(weight, mean_grad + int64_t{label} * channels + c, channels - c, v);
        bins.add(r, g.saved + r.saved.inv_bin_count, mean_grad, channels, c, v);
      }
      store_run(g.outs + i * g.pitch + c, channels - c, v);
    });
  });
}

// g.outs [m, pitch], or token_grad in later rounds, = the gradients of the tokens first .. first + m by way
// of their keys, and, where values are the same tokens, of these. g.rows: the tokens; projected: unused
template <class T, int kBlocks>
FRD_DEVICE void key_side_grads(const GradItem<T, kBlocks>& g, int t, int first, int m) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const RoundWork& w = g.a.work[t];
  const int channels = g.channels;
  const bool projected = r.key_weight != nullptr;
  for_rows(m, [&](int i) {
    const int n = first + i, label = g.labels_of(t)[n];
    A* kept = g.work + w.token_grad + int64_t{n} * channels;
    A* to = t > 0 ? kept : g.outs + i * g.pitch;
    if (label < 0) {  // takes no part: its key may be anything
      const A zeros[kRun] = {};
      for_runs(channels, [&](int c) { store_run(to + c, channels - c, zeros); });
      return;
    }
    const A weight = g.weight_of(t, g.saved[r.saved.cosine + n]);
    const TokenPull<T, kBlocks> pull(g, t, n);
    const TokenBins bins(r, n);
    for_runs(channels, [&](int c) {
      const int left = channels - c;
      A v[kRun];
      load_run((projected ? kept : g.rows + i * g.pitch) + c, left, v);
      if (!projected) pull.turn(c, v);
      if (g.a.shared) add_run(weight, g.work + w.mean_grad + int64_t{label} * channels + c, left, v);
      bins.add(r, g.saved + r.saved.inv_bin_count, g.work + w.pooled_grad, channels, c, v);
      store_run(to + c, left, v);
    });
  });
}

// The gradients of the block's tokens: stored, or token_grad [N, C] in later rounds.
template <class T, int kBlocks>
FRD_DEVICE void token_grads(const GradItem<T, kBlocks>& g, int t) {
  const int channels = g.channels;
  g.for_tiles(g.own(g.a.round[t].tokens()), [&](int first, int m) {
    if (g.a.round[t].key_weight == nullptr) g.keys(t).tile(first, m, g.rows, g.pitch);
    __syncthreads();
    key_side_grads(g, t, first, m);
    if (t > 0) return;
    __syncthreads();
    store_tile(g.outs, g.pitch, first, m, channels, rows_of<T>(g.a.keys_grad, g.item));
    if (g.a.shared) return;
    __syncthreads();
    value_grads(g, t, first, m);
    __syncthreads();
    store_tile(g.outs, g.pitch, first, m, channels, rows_of<T>(g.a.values_grad, g.item));
  });
}

}  // namespace frd
