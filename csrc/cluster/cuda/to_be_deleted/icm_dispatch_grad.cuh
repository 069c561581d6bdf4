// From the gradient of the ICM's output to those of the last centres and of the cosines, by a team.
#pragma once
#include "cluster/cuda/to_be_deleted/round_grad.cuh"

namespace frd {

// ---- along the labels ----

// The product of the weights of rounds `t` and later along the chain of labels from token `at` of round t,
// and the last centre it ends in.
template <class A>
struct Chain {
  A weight;
  int last;
};
template <class T, int kBlocks>
FRD_DEVICE Chain<compute_t<T>> follow(const GradItem<T, kBlocks>& g, int t, int at) {
  compute_t<T> weight = 1;
#pragma unroll 1
  for (; t < g.a.count; ++t) {
    weight *= g.weight_of(t, g.saved[g.a.round[t].saved.cosine + at]);
    at = g.labels_of(t)[at];
  }
  return {weight, at};
}

// Of the block's tokens: last centre and coefficient with which it comes to the output; similarity_grad and
// flow, the gradient of the product of the weights of the later rounds.
template <class T, int kBlocks>
FRD_DEVICE void follow_tokens(const GradItem<T, kBlocks>& g) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[0];
  const RoundWork& w = g.a.work[0];
  const A* centres = g.saved + g.a.round[g.a.count - 1].saved.result;
  const int channels = g.channels;
  g.for_tiles(g.own(r.tokens()), [&](int first, int m) {
    g.grad().tile(first, m, g.rows, g.pitch);
    __syncthreads();
    if (g.a.copies_grad) g.keep(g.rows, first, m, g.a.grad_copy);
    for_rows(m, [&](int i) {
      const int n = first + i;
      const A weight = g.weight_of(0, g.saved[r.saved.cosine + n]);
      const Chain<A> later = follow(g, 1, g.labels_of(0)[n]);
      A along = 0;
      for_runs(channels, [&](int c) {
        A v[kRun], centre[kRun];
        load_run(g.rows + i * g.pitch + c, channels - c, v);
        load_run(centres + int64_t{later.last} * channels + c, channels - c, centre);
        FRD_UNROLL
        for (int e = 0; e < kRun; ++e) along += v[e] * centre[e];
      });
      along = warp_sum(along);
      if (lane_of_warp() != 0) return;
      reinterpret_cast<int32_t*>(g.work + g.a.last)[n] = later.last;
      g.work[g.a.coefficient + n] = weight * later.weight;
      g.work[w.similarity_grad + n] = later.weight * along;
      g.work[w.flow + n] = weight * along;
    });
  });
}

// similarity_grad of the later rounds, by one block.
template <class T, int kBlocks>
FRD_DEVICE void follow_centres(const GradItem<T, kBlocks>& g) {
  using A = compute_t<T>;
#pragma unroll 1
  for (int t = 1; t < g.a.count; ++t) {
    const RoundArgs &r = g.a.round[t], &before = g.a.round[t - 1];
    const RoundWork& w = g.a.work[t];
    for_rows(r.tokens(), [&](int n) {
      const A sum = label_total(g.labels_of(t - 1), g.work + g.a.work[t - 1].flow, before.tokens(), n);
      if (lane_of_warp() == 0) g.work[w.flow_grad + n] = sum;
    });
    __syncthreads();
    for (int n = threadIdx.x; n < r.tokens(); n += kTeamThreads) {
      const A grad = g.work[w.flow_grad + n];
      g.work[w.similarity_grad + n] = grad * follow(g, t + 1, g.labels_of(t)[n]).weight;
      g.work[w.flow + n] = grad * g.weight_of(t, g.saved[r.saved.cosine + n]);
    }
    __syncthreads();
  }
}

template <class T, int kBlocks>
FRD_DEVICE void masked_dispatch_grad(const GradItem<T, kBlocks>& g) {
  follow_tokens(g);
  Team<kBlocks>::sync();
  label_sums<T, kBlocks>(g.copied_grad(), reinterpret_cast<const int32_t*>(g.work + g.a.last),
                         g.work + g.a.coefficient, g.a.round[0].tokens(), g.a.columns, g.a.dispatch_parts,
                         g.work + g.a.last_sums, static_cast<compute_t<T>*>(nullptr));
  if (Team<kBlocks>::rank() == kBlocks - 1) follow_centres(g);
}

// ---- dense ----

// Of the block's tokens: the product of the cosines, the gate, and the gradients of both.
template <class T, int kBlocks>
FRD_DEVICE void dense_tokens(const GradItem<T, kBlocks>& g) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[0];
  const RoundWork& w = g.a.work[0];
  const int channels = g.channels, columns = g.a.columns;
  const A *projected = g.saved + r.saved.projected, *offset = g.saved + r.saved.offset,
          *centres = g.saved + g.a.round[g.a.count - 1].saved.result;
  const A alpha = g.gate(g.a.alpha, 0), beta = g.gate(g.a.beta, 0);
  double alpha_grad = 0, beta_grad = 0;
  g.for_tiles(g.own(r.tokens()), [&](int first, int m) {
    g.values(0).tile(first, m, g.rows, g.pitch);
    g.grad().tile(first, m, g.outs, g.pitch);
    __syncthreads();
    if (g.a.copies_keys) g.keep(g.rows, first, m, g.a.keys_copy);
    if (g.a.copies_grad) g.keep(g.outs, first, m, g.a.grad_copy);
    for_rows(m, [&](int i) {
      const A scale = g.saved[r.saved.inv_norm + first + i];
#pragma unroll 1
      for (int j = 0; j < columns; ++j) {
        A product = 0, along = 0;
        for_runs(channels, [&](int c) {
          A token[kRun], grad[kRun], query[kRun], centre[kRun];
          load_run(g.rows + i * g.pitch + c, channels - c, token);
          load_run(g.outs + i * g.pitch + c, channels - c, grad);
          load_run(projected + int64_t{j} * channels + c, channels - c, query);
          load_run(centres + int64_t{j} * channels + c, channels - c, centre);
          FRD_UNROLL
          for (int e = 0; e < kRun; ++e) product += token[e] * query[e], along += grad[e] * centre[e];
        });
        product = scale * (warp_sum(product) + offset[j]);
        const A gate = team_sigmoid(alpha * product + beta);
        const A argument = warp_sum(along) * gate * (A(1) - gate);
        alpha_grad += static_cast<double>(argument * product);
        beta_grad += static_cast<double>(argument);
        if (lane_of_warp() != 0) continue;
        const int64_t at = int64_t{first + i} * columns + j;
        g.work[w.product + at] = product;
        g.work[w.product_grad + at] = alpha * argument;
        g.work[g.a.gate + at] = gate;
        g.work[g.a.pull + at] = scale * alpha * argument;
      }
    });
  });
  g.give_gate(0, alpha_grad, beta_grad);
}

// sums [parts, J, C] = weights^T rows, weights [N, J]; totals [parts, J] of the weights, or null. By the
// warps warp, warp + warps, ... No barrier.
template <class T>
FRD_DEVICE void weighted_sums(const TokenRows<T>& rows, const compute_t<T>* weights, int tokens, int columns,
                              int parts, compute_t<T>* sums, compute_t<T>* totals, int warp, int warps) {
  using A = compute_t<T>;
  constexpr int kColumns = 4;
  const int slabs = (rows.channels + kSlab - 1) / kSlab, groups = (columns + kColumns - 1) / kColumns;
#pragma unroll 1
  for (int u = warp; u < slabs * groups * parts; u += warps) {
    const int part = u / (slabs * groups), rest = u - part * slabs * groups;
    const int group = rest / slabs, slab = rest - group * slabs, c = slab * kSlab + lane_of_warp() * kRun;
    const Range range = part_of(tokens, parts, part);
    const int left = columns - group * kColumns;
    A sum[kColumns][kRun] = {}, total[kColumns] = {};
#pragma unroll 4
    for (int n = range.begin; n < range.end; ++n) {
      A v[kRun];
      rows.run(n, c, v);
      FRD_UNROLL
      for (int k = 0; k < kColumns; ++k) {
        const A weight = k < left ? weights[int64_t{n} * columns + group * kColumns + k] : A(0);
        total[k] += weight;
        FRD_UNROLL
        for (int e = 0; e < kRun; ++e) sum[k][e] += weight * v[e];
      }
    }
    FRD_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      if (k >= left) break;
      const int64_t row = int64_t{part} * columns + group * kColumns + k;
      store_run(sums + row * rows.channels + c, rows.channels - c, sum[k]);
      if (totals != nullptr && slab == 0 && lane_of_warp() == 0) totals[row] = total[k];
    }
  }
}

// query_grad [J, C] = the sum of `parts` of query_sums, through the key projection. By one block.
template <class T, int kBlocks>
FRD_DEVICE void lift_query_grad(const GradItem<T, kBlocks>& g, int t, int parts) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const int channels = g.channels, columns = g.a.columns;
  g.for_tiles({0, columns}, [&](int first, int m) {
    for_rows(m, [&](int i) {
      for_runs(channels, [&](int c) {
        A v[kRun];
        const A* sums = g.work + g.a.query_sums + int64_t{first + i} * channels + c;
        run_of_parts(sums, parts, int64_t{columns} * channels, channels - c, v);
        store_run(g.rows + i * g.pitch + c, channels - c, v);
      });
    });
    if (r.key_weight != nullptr)
      rows_times_weight<true, T, kGradParts>(g.rows, g.pitch, m, static_cast<const T*>(r.key_weight),
                                             channels, g.outs, g.pitch, g.scratch);
    for_rows(m, [&](int i) {
      A pulls = 0;
#pragma unroll 1
      for (int p = 0; p < parts; ++p) pulls += g.work[g.a.query_pulls + p * columns + first + i];
      for_runs(channels, [&](int c) {
        A v[kRun];
        load_run((r.key_weight != nullptr ? g.outs : g.rows) + i * g.pitch + c, channels - c, v);
        if (r.key_weight != nullptr) add_run(pulls, static_cast<const T*>(r.key_bias) + c, channels - c, v);
        store_run(g.work + g.a.work[t].query_grad + int64_t{first + i} * channels + c, channels - c, v);
      });
    });
  });
}

// product_grad of round t > 0 and the sums of its tokens that query_grad takes; returns their parts. By one
// block. g.a.pull is overwritten.
template <class T, int kBlocks>
FRD_DEVICE int query_sums(const GradItem<T, kBlocks>& g, int t) {
  using A = compute_t<T>;
  const RoundArgs& r = g.a.round[t];
  const int channels = g.channels, columns = g.a.columns;
  const A *query_grad = g.work + g.a.work[t - 1].query_grad, *unit = g.saved + g.a.round[t - 1].saved.unit;
  A* pulls = g.work + g.a.pull;
  for_rows(r.tokens() * columns, [&](int at) {
    const int n = at / columns, j = at - n * columns;
    const A grad = warp_dot(unit + int64_t{n} * channels, query_grad + int64_t{j} * channels, channels);
    if (lane_of_warp() != 0) return;
    g.work[g.a.work[t].product_grad + at] = grad;
    pulls[at] = g.saved[r.saved.inv_norm + n] * grad;
  });
  __syncthreads();
  const int most = (r.tokens() + 15) / 16, parts = most < g.a.dispatch_parts ? most : g.a.dispatch_parts;
  weighted_sums(g.values(t), pulls, r.tokens(), columns, parts, g.work + g.a.query_sums,
                g.work + g.a.query_pulls, warp_of_block(), kTeamWarps);
  __syncthreads();
  return parts;
}

// query_grad of every round and product_grad of the later ones, by one block.
template <class T, int kBlocks>
FRD_DEVICE void dense_centres(const GradItem<T, kBlocks>& g) {
#pragma unroll 1
  for (int t = 0; t < g.a.count; ++t) {
    const int parts = t == 0 ? g.a.dispatch_parts : query_sums(g.renewed(), t);
    lift_query_grad(g.renewed(), t, parts);
  }
}

template <class T, int kBlocks>
FRD_DEVICE void dense_dispatch_grad(const GradItem<T, kBlocks>& g) {
  const int tokens = g.a.round[0].tokens(), channels = g.channels;
  const int warp = warp_of_team<kBlocks>(), warps = kTeamWarps * kBlocks;
  dense_tokens(g);
  Team<kBlocks>::sync();
  weighted_sums(g.copied_grad(), g.work + g.a.gate, tokens, g.a.columns, g.a.dispatch_parts,
                g.work + g.a.last_sums, static_cast<compute_t<T>*>(nullptr), warp, warps);
  weighted_sums(g.keys(0), g.work + g.a.pull, tokens, g.a.columns, g.a.dispatch_parts,
                g.work + g.a.query_sums, g.work + g.a.query_pulls, warp, warps);
  Team<kBlocks>::sync();
  if (Team<kBlocks>::rank() == kBlocks - 1) dense_centres(g);
}

}  // namespace frd
