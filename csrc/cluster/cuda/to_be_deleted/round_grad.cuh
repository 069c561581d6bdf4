// Gradients of one round by a team: from those of its centres and of its cosines to those of its tokens.
#pragma once
#include "cluster/cuda/to_be_deleted/grad_rows.cuh"

namespace frd {

// What the phases work on: an item, its parts of `saved` and of the workspace, and the block's memory.
template <class T, int kBlocks>
struct GradItem {
  using A = compute_t<T>;
  const IcmGradArgs& a;
  int item, channels;
  A *saved, *work;
  const int32_t* labels;
  A *rows, *outs, *scratch;  // [tile, pitch] twice; for a product
  double* sums;              // [kTeamWarps, 2]
  int pitch;

  // The same; what the compiler derives from it, as addresses, takes no registers beyond its scope.
  __device__ GradItem renewed() const {
    GradItem g = *this;
    forget(g.item), forget(g.channels), forget(g.pitch);
    forget(g.saved), forget(g.work), forget(g.labels);
    forget(g.rows), forget(g.outs), forget(g.scratch);
    return g;
  }
  __device__ const int32_t* labels_of(int t) const { return labels + a.round[t].labels; }
  __device__ A gate(const void* gates, int t) const { return static_cast<const A*>(gates)[t]; }
  __device__ A weight_of(int t, A cosine) const {
    return a.weighted ? team_sigmoid(gate(a.beta, t) + gate(a.alpha, t) * cosine) : A(1);
  }
  __device__ Range own(int count) const {
    return rows_of_block(count, kBlocks, Team<kBlocks>::rank(), a.row_step);
  }
  __device__ Rows<T> copy(int64_t at) const { return {reinterpret_cast<T*>(work + at), channels, 1}; }
  // Tokens whose values round t gathers, and the gradient of the output, as they came.
  __device__ TokenRows<T> values(int t) const {
    if (t > 0) return {{}, saved + a.round[t - 1].saved.result, channels};
    return TokenRows<T>::of(a.values, item, channels);
  }
  __device__ TokenRows<T> grad() const { return TokenRows<T>::of(a.grad, item, channels); }
  // Tokens whose keys round t compares, and that gradient, once the team has copied them.
  __device__ TokenRows<T> keys(int t) const {
    if (t > 0) return values(t);
    if (a.copies_keys) return {copy(a.keys_copy), nullptr, channels};
    return TokenRows<T>::of(a.keys, item, channels);
  }
  __device__ TokenRows<T> copied_grad() const {
    if (a.copies_grad) return {copy(a.grad_copy), nullptr, channels};
    return grad();
  }
  // Keeps the tile at `from`: rows first .. first + m of the copy.
  __device__ void keep(const A* from, int first, int m, int64_t at) const {
    store_tile(from, pitch, first, m, channels, copy(at));
  }
  // f(first, m) for the tiles of a range
  template <class F>
  __device__ void for_tiles(Range range, const F& f) const {
#pragma unroll 1
    for (int first = range.begin; first < range.end; first += a.tile) {
      f(first, range.end - first < a.tile ? range.end - first : a.tile);
      __syncthreads();
    }
  }
  // Ends this block's part of the gradients of gate t, of which lane 0 of each warp has a share.
  __device__ void give_gate(int t, double alpha, double beta) const {
    if (lane_of_warp() == 0) sums[2 * warp_of_block()] = alpha, sums[2 * warp_of_block() + 1] = beta;
    __syncthreads();
    if (threadIdx.x < 2) {
      double sum = 0;
      for (int w = 0; w < kTeamWarps; ++w) sum += sums[2 * w + threadIdx.x];
      a.gate_parts[((int64_t{item} * a.gates + t) * kGradBlocks + Team<kBlocks>::rank()) * 2 + threadIdx.x] =
          sum;
    }
    __syncthreads();
  }
};

// rows [m, pitch] = the gradients of the round's centres first .. first + m; kept for the gradient of Wv.
template <class T, int kBlocks>
FRD_DEVICE void load_result_grad(const GradItem<T, kBlocks>& g, int t, int first, int m) {
  using A = compute_t<T>;
  const int channels = g.channels;
  A* kept = g.work + g.a.work[t].result_grad;
  if (t < g.a.count - 1) {
    TokenRows<T>{{}, kept, channels}.tile(first, m, g.rows, g.pitch);
    return;
  }
  if (!g.a.dispatch) {
    g.grad().tile(first, m, g.rows, g.pitch);
    return;
  }
  const A* sums = g.work + g.a.last_sums;
  for_rows(m, [&](int i) {
    for_runs(channels, [&](int c) {
      A v[kRun];
      const int64_t at = int64_t{first + i} * channels + c;
      run_of_parts(sums + at, g.a.dispatch_parts, int64_t{g.a.columns} * channels, channels - c, v);
      store_run(g.rows + i * g.pitch + c, channels - c, v);
      store_run(kept + at, channels - c, v);
    });
  });
}

// mean_grad [O, C] and mean_dot [O] of the block's centres.
template <class T, int kBlocks>
FRD_DEVICE void mean_grads(const GradItem<T, kBlocks>& g, int t) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const RoundWork& w = g.a.work[t];
  const int channels = g.channels;
  g.for_tiles(g.own(r.centres()), [&](int first, int m) {
    load_result_grad(g, t, first, m);
    __syncthreads();
    const A* from = g.rows;
    if (r.value_weight != nullptr) {
      rows_times_weight<false, T, kGradParts>(g.rows, g.pitch, m, static_cast<const T*>(r.value_weight),
                                              channels, g.outs, g.pitch, g.scratch);
      from = g.outs;
    }
    for_rows(m, [&](int i) {
      const int o = first + i;
      const A mass = g.saved[r.saved.weight_sum + o];
      A along = 0;
      for_runs(channels, [&](int c) {
        A v[kRun], mean[kRun];
        load_run(from + i * g.pitch + c, channels - c, v);
        load_run(g.saved + r.saved.mean + int64_t{o} * channels + c, channels - c, mean);
        FRD_UNROLL
        for (int e = 0; e < kRun; ++e) v[e] /= mass, along += v[e] * mean[e];
        store_run(g.work + w.mean_grad + int64_t{o} * channels + c, channels - c, v);
      });
      along = warp_sum(along);
      if (lane_of_warp() == 0) g.work[w.mean_dot + o] = along;
    });
  });
}

// pull [N] of the block's tokens: the gradient of the own cosine, times the inverse norm of the key.
template <class T, int kBlocks>
FRD_DEVICE void token_pulls(const GradItem<T, kBlocks>& g, int t) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const RoundWork& w = g.a.work[t];
  const int channels = g.channels;
  double alpha_grad = 0, beta_grad = 0;
  g.for_tiles(g.own(r.tokens()), [&](int first, int m) {
    if (g.a.weighted) g.values(t).tile(first, m, g.rows, g.pitch);
    const bool copies = t == 0 && g.a.copies_keys, of_values = g.a.weighted && g.a.shared;
    if (copies && !of_values) TokenRows<T>::of(g.a.keys, g.item, channels).tile(first, m, g.outs, g.pitch);
    __syncthreads();
    if (copies) g.keep(of_values ? g.rows : g.outs, first, m, g.a.keys_copy);
    for_rows(m, [&](int i) {
      const int n = first + i, label = g.labels_of(t)[n];
      A pull = 0;
      if (label >= 0) {
        const A cosine = g.saved[r.saved.cosine + n];
        A grad = g.a.dispatch
                     ? g.work[w.similarity_grad + n]
                     : static_cast<const A*>(
                           g.a.similarity_grad)[g.item * g.a.similarity_batch + n * g.a.similarity_token];
        if (g.a.weighted) {
          const A weight = g.weight_of(t, cosine);
          A pulled = 0;
          for_runs(channels, [&](int c) {
            A v[kRun], mean_grad[kRun];
            load_run(g.rows + i * g.pitch + c, channels - c, v);
            load_run(g.work + w.mean_grad + int64_t{label} * channels + c, channels - c, mean_grad);
            FRD_UNROLL
            for (int e = 0; e < kRun; ++e) pulled += v[e] * mean_grad[e];
          });
          pulled = warp_sum(pulled) - g.work[w.mean_dot + label];
          const A argument = (grad + pulled) * weight * (A(1) - weight);
          alpha_grad += static_cast<double>(argument * cosine);
          beta_grad += static_cast<double>(argument);
          grad = g.gate(g.a.alpha, t) * argument;
        }
        pull = grad * g.saved[r.saved.inv_norm + n];
      }
      if (lane_of_warp() == 0) g.work[w.pull + n] = pull;
    });
  });
  if (g.a.weighted) g.give_gate(t, alpha_grad, beta_grad);
}

// sums [parts, O, C] of pull * token and pulls [parts, O] of pull, a share of them by each block.
template <class T, int kBlocks>
FRD_DEVICE void sum_pulls(const GradItem<T, kBlocks>& g, int t) {
  const RoundArgs& r = g.a.round[t];
  const RoundWork& w = g.a.work[t];
  label_sums<T, kBlocks>(g.keys(t), g.labels_of(t), g.work + w.pull, r.tokens(), r.centres(), w.parts,
                         g.work + w.sums, g.work + w.pulls);
}

// The gradient of a token's key from that of its own cosine, or of the product of the cosines: what does not
// depend on the channel.
template <class T, int kBlocks>
struct TokenPull {
  using A = compute_t<T>;
  const GradItem<T, kBlocks>& g;
  const A *unit, *product_grad;  // unit [C] of the own centre; dense: query [J, C]
  A pull, back;
  int columns;

  __device__ TokenPull(const GradItem<T, kBlocks>& item, int t, int n) : g(item), pull(0), back(0) {
    const RoundArgs& r = g.a.round[t];
    const RoundWork& w = g.a.work[t];
    const A scale = g.saved[r.saved.inv_norm + n], live = is_live(scale) ? scale : A(0);
    columns = g.a.dense ? g.a.columns : 0;
    if (!g.a.dense) {
      const int label = g.labels_of(t)[n];
      unit = g.saved + r.saved.unit + int64_t{label} * g.channels;
      product_grad = nullptr;
      pull = is_live(scale) ? g.work[w.pull + n] : A(0);
      back = -pull * g.saved[r.saved.cosine + n] * scale;
      return;
    }
    unit = g.saved + r.saved.query;
    const A* product = (t == 0 ? g.work + w.product : g.saved + r.saved.product) + int64_t{n} * columns;
    product_grad = g.work + w.product_grad + int64_t{n} * columns;
    A along = 0;
#pragma unroll 1
    for (int j = lane_of_warp(); j < columns; j += 32) along += product[j] * product_grad[j];
    pull = live;
    back = -warp_sum(along) * scale * live;
  }

  // v: of the key at channel c, turned into its gradient
  __device__ void turn(int c, A (&v)[kRun]) const {
    const int left = g.channels - c;
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] *= back;
    if (product_grad == nullptr) add_run(pull, unit + c, left, v);
#pragma unroll 1
    for (int j = 0; j < columns; ++j)
      add_run(pull * product_grad[j], unit + int64_t{j} * g.channels + c, left, v);
  }
};

// The gradient of the key of the pooled tokens of centre o. in [C]: of the key's direction
template <class T, int kBlocks>
FRD_DEVICE void centre_key_grad(const GradItem<T, kBlocks>& g, int t, int o, const compute_t<T>* in,
                                compute_t<T>* out) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const int channels = g.channels;
  const A* unit = g.saved + r.saved.unit + int64_t{o} * channels;
  const A scale = g.saved[r.saved.unit_inv_norm + o], live = is_live(scale) ? scale : A(0);
  A along = 0;
  for_runs(channels, [&](int c) {
    A v[kRun], direction[kRun];
    load_run(in + c, channels - c, v);
    load_run(unit + c, channels - c, direction);
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) along += v[e] * direction[e];
  });
  along = warp_sum(along);
  for_runs(channels, [&](int c) {
    A v[kRun], direction[kRun];
    load_run(in + c, channels - c, v);
    load_run(unit + c, channels - c, direction);
    FRD_UNROLL
    for (int e = 0; e < kRun; ++e) v[e] = (v[e] - direction[e] * along) * live;
    store_run(out + c, channels - c, v);
  });
}

// to [C] = the gradient of the pooled token of centre o that comes from its key, plus that of the mean.
template <class T, int kBlocks>
FRD_DEVICE void give_pooled_grad(const GradItem<T, kBlocks>& g, int t, int o, const compute_t<T>* from) {
  using A = compute_t<T>;
  const int channels = g.channels;
  const int64_t row = int64_t{o} * channels;
  for_runs(channels, [&](int c) {
    A v[kRun];
    load_run(from + c, channels - c, v);
    if (g.a.shared) add_run(A(1), g.work + g.a.work[t].mean_grad + row + c, channels - c, v);
    store_run(g.work + g.a.work[t].pooled_grad + row + c, channels - c, v);
  });
}

// v = the run at channel c of the gradient of the direction of centre o's key; projected, not dense: before
// the projection.
template <class T, int kBlocks>
FRD_DEVICE void unit_grad_run(const GradItem<T, kBlocks>& g, int t, int o, int c, compute_t<T> (&v)[kRun]) {
  using A = compute_t<T>;
  const int channels = g.channels, left = channels - c;
  const RoundWork& w = g.a.work[t];
  if (!g.a.dense) {
    const int64_t size = int64_t{g.a.round[t].centres()} * channels;
    run_of_parts(g.work + w.sums + int64_t{o} * channels + c, w.parts, size, left, v);
    return;
  }
  const A* query_grad = g.work + w.query_grad + c;
  if (t == g.a.count - 1) {
    load_run(query_grad + int64_t{o} * channels, left, v);
    return;
  }
  const A* product = g.saved + g.a.round[t + 1].saved.product + int64_t{o} * g.a.columns;
  FRD_UNROLL
  for (int e = 0; e < kRun; ++e) v[e] = 0;
#pragma unroll 1
  for (int j = 0; j < g.a.columns; ++j) add_run(product[j], query_grad + int64_t{j} * channels, left, v);
}

// pooled_grad [O, C] of the block's centres, of a round without projections.
template <class T, int kBlocks>
FRD_DEVICE void centre_grads(const GradItem<T, kBlocks>& g, int t) {
  using A = compute_t<T>;
  const int channels = g.channels;
  g.for_tiles(g.own(g.a.round[t].centres()), [&](int first, int m) {
    for_rows(m, [&](int i) {
      A* row = g.rows + i * g.pitch;
      for_runs(channels, [&](int c) {
        A v[kRun];
        unit_grad_run(g, t, first + i, c, v);
        store_run(row + c, channels - c, v);
      });
      centre_key_grad(g, t, first + i, row, row);
      give_pooled_grad(g, t, first + i, row);
    });
  });
}

}  // namespace frd
