// Stages of the backward pass of a round, see RoundGradOps.
#include "cluster/cpu/kernels.h"

#include "cluster/cpu/tiles.h"

namespace frd {
namespace FRD_ISA {
namespace {

// mean_grad = result_grad Wv / weight_sum, mean_dot = mean . mean_grad
template <class A>
void mean_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.blocks();
    const int64_t first = task % r.blocks() * kCentreBlock;
    const int64_t m = centres - first < kCentreBlock ? centres - first : kCentreBlock;
    const A* result_grad = g.result_grad[b] + first * channels;
    A* out = g.mean_grad[b] + first * channels;
    if (g.value_packed != nullptr)
      gemm_of(A()).run(result_grad, channels, g.value_packed, out, channels, m, channels, channels, false);
    else
      for (int64_t c = 0; c < m * channels; ++c) out[c] = result_grad[c];
    for (int64_t i = 0; i < m; ++i) {
      A* row = out + i * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] /= r.weight_sum[b][first + i];
      g.mean_dot[b][first + i] = dot(row, r.mean[b] + (first + i) * channels, channels);
    }
  }
}

// Gradient of the own cosine of token n, whose value is `value` [C]; adds those of alpha and beta to
// gate_grad: alpha (similarity_grad + (value - mean) . mean_grad) w (1 - w) with w = sigmoid(beta + alpha
// cos).
template <class A>
A cosine_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t n, const A* value,
              A* gate_grad) {
  const A similarity_grad = g.similarity_grad[b][n];
  if (!r.weighted) return similarity_grad;
  const int32_t label = r.labels[b][n];
  const A cosine = r.cosine[b][n];
  const A weight = token_weight(r, cosine);
  const A dweight = dot(value, g.mean_grad[b] + label * r.channels, r.channels) - g.mean_dot[b][label];
  const A argument_grad = (similarity_grad + dweight) * weight * (A(1) - weight);
  gate_grad[0] += argument_grad * cosine;
  gate_grad[1] += argument_grad;
  return r.alpha * argument_grad;
}

// dcos_n = cosine_grad * inv_norm_n, with its sums and the sums of dcos_n key_n over each cluster.
template <class A>
void dcos(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  Scratch<A> values_buffer(kTile * channels);
  Scratch<A> keys_buffer(kTile * channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.chunks;
    const int64_t chunk = task % r.chunks;
    A* key_sums = g.dcos_key_sums[b] + chunk * centres * channels;
    A* dcos_sums = g.dcos_sums[b] + chunk * centres;
    A* gate_grad = g.gate_grad[b] + chunk * 2;
    fill(key_sums, centres * channels, A(0));
    fill(dcos_sums, centres, A(0));
    fill(gate_grad, 2, A(0));
    const Span span = chunk_span(r.tokens(), r.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* values = nullptr;
      if (r.weighted || r.shared) values = load_tile<A>(r.values, b, first, m, channels, values_buffer);
      // Not projected: the projection is linear and is applied to the sums.
      const A* keys = r.shared ? values : load_tile<A>(r.keys, b, first, m, channels, keys_buffer);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t n = first + i;
        if (!r.in_mask(b, n)) {
          g.dcos[b][n] = 0;
          continue;
        }
        const A dcos = cosine_grad(r, g, b, n, values + i * channels, gate_grad) * r.inv_norm[b][n];
        const int32_t label = r.labels[b][n];
        g.dcos[b][n] = dcos;
        dcos_sums[label] += dcos;
        add_scaled(dcos, keys + i * channels, channels, key_sums + label * channels);
      }
    }
  }
}

// unit_key_grad [m, C] of the centres first .. first + m: the chunks' sums of dcos_n key_n, projected.
template <class A>
void gather_unit_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t first,
                      int64_t m, A* sums, A* unit_key_grad) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  for (int64_t i = 0; i < m; ++i) {
    A* sum = sums + i * channels;
    A dcos = 0;
    fill(sum, channels, A(0));
    for (int64_t k = 0; k < r.chunks; ++k) {
      dcos += g.dcos_sums[b][k * centres + first + i];
      add_scaled(A(1), g.dcos_key_sums[b] + (k * centres + first + i) * channels, channels, sum);
    }
    A* out = unit_key_grad + i * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = r.key_packed == nullptr ? sum[c] : dcos * r.key_bias[c];
  }
  if (r.key_packed != nullptr)
    gemm_of(A()).run(sums, channels, r.key_packed, unit_key_grad, channels, m, channels, channels, true);
}

// pooled_key_grad = (unit_key_grad - unit_key (unit_key . unit_key_grad)) * pooled_inv_norm, the gradient of
// the normalisation; pooled_grad = pooled_key_grad Wk (+ mean_grad if shared).
template <class A>
void pooled_key_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  Scratch<A> sums(kCentreBlock * channels);
  Scratch<A> block_grad(kCentreBlock * channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.blocks();
    const int64_t first = task % r.blocks() * kCentreBlock;
    const int64_t m = centres - first < kCentreBlock ? centres - first : kCentreBlock;
    const A* unit_key_grad = block_grad;
    if (g.dense)
      unit_key_grad = g.unit_key_grad[b] + first * channels;
    else
      gather_unit_grad<A>(r, g, b, first, m, sums, block_grad);
    A* key_grad = g.pooled_key_grad[b] + first * channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* unit_key = r.unit_key[b] + (first + i) * channels;
      const A* in = unit_key_grad + i * channels;
      const A inv_norm = is_live(r.pooled_inv_norm[b][first + i]) ? r.pooled_inv_norm[b][first + i] : A(0);
      const A parallel = dot(unit_key, in, channels);
      for (int64_t c = 0; c < channels; ++c)
        key_grad[i * channels + c] = (in[c] - unit_key[c] * parallel) * inv_norm;
    }
    A* out = g.pooled_grad[b] + first * channels;
    const A* of_mean = g.mean_grad[b] + first * channels;
    const bool projected = g.key_packed != nullptr;
    for (int64_t c = 0; c < m * channels; ++c)
      out[c] = (r.shared ? of_mean[c] : A(0)) + (projected ? A(0) : key_grad[c]);
    if (projected)
      gemm_of(A()).run(key_grad, channels, g.key_packed, out, channels, m, channels, channels, true);
  }
}

// rows [m, C] += sum over the bins that cover a token of bins / bin count: the gradient of the bin means, for
// the tokens first .. first + m. bins [O, C]
template <class A>
void add_pooled_grad(const ClusterRound<A>& r, int64_t b, const A* bins, int64_t first, int64_t m, A* rows) {
  for (int64_t n = first; n < first + m; ++n) {
    if (!r.in_mask(b, n)) continue;
    const int64_t y = n / r.width;
    const int64_t x = n % r.width;
    for (int64_t i = first_bin(y, r.height, r.grid_height); i <= last_bin(y, r.height, r.grid_height); ++i)
      for (int64_t j = first_bin(x, r.width, r.grid_width); j <= last_bin(x, r.width, r.grid_width); ++j) {
        const int64_t bin = i * r.grid_width + j;
        add_scaled(r.inv_bin_count[b][bin], bins + bin * r.channels, r.channels,
                   rows + (n - first) * r.channels);
      }
  }
}

template <class A>
struct TokenBuffers {
  Scratch<A> tokens, keys, key_grad, token_grad, packed, grad, product, product_grad, gate;
  TokenBuffers(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g)
      : tokens(kTile * r.channels),
        keys(kTile * r.channels),
        key_grad(kTile * r.channels),
        token_grad(kTile * r.channels),
        packed(gemm_of(A()).packed_size(kTile, r.channels)),
        grad(kTile * r.channels),
        product(kTile * g.last_centres),
        product_grad(kTile * g.last_centres),
        gate(kTile * g.last_centres) {}
};

// key_grad [m, C] from the gradient dP of the product of cosines P:
// inv_norm (dP Q^T - (P . dP) inv_norm key).
template <class A>
void dense_key_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t first,
                    int64_t m, const A* tokens, const A* keys, TokenBuffers<A>& buffers) {
  const int64_t channels = r.channels;
  const int64_t last_centres = g.last_centres;
  const A* inv_norm = r.inv_norm[b] + first;
  const A *product, *product_grad;
  if (g.dispatch != nullptr) {
    const A* grad = load_tile<A>(g.dispatch->grad, b, first, m, channels, buffers.grad);
    dense_product<A>(*g.dispatch, b, tokens, inv_norm, m, channels, buffers.product);
    dense_gate_grad<A>(*g.dispatch, b, buffers.product, grad, m, channels, buffers.gate,
                       buffers.product_grad);
    for (int64_t i = 0; i < m * last_centres; ++i) buffers.product_grad[i] *= g.dispatch->alpha;
    product = buffers.product;
    product_grad = buffers.product_grad;
  } else {
    product = g.product[b] + first * last_centres;
    product_grad = g.product_grad[b] + first * last_centres;
  }
  for (int64_t i = 0; i < m; ++i) {
    A* out = buffers.key_grad + i * channels;
    const A live_inv_norm = is_live(inv_norm[i]) ? inv_norm[i] : A(0);
    A parallel = 0;
    for (int64_t j = 0; j < last_centres; ++j)
      parallel += product[i * last_centres + j] * product_grad[i * last_centres + j];
    const A key_factor = -parallel * inv_norm[i] * live_inv_norm;
    for (int64_t c = 0; c < channels; ++c) out[c] = key_factor * keys[i * channels + c];
    for (int64_t j = 0; j < last_centres; ++j)
      add_scaled(live_inv_norm * product_grad[i * last_centres + j], g.query[b] + j * channels, channels,
                 out);
  }
}

// key_grad [m, C] from the gradient of the own cosine: dcos (unit_key - cos inv_norm key).
template <class A>
void own_key_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t first, int64_t m,
                  const A* keys, A* key_grad) {
  const int64_t channels = r.channels;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t n = first + i;
    A* out = key_grad + i * channels;
    if (!r.in_mask(b, n)) {
      fill(out, channels, A(0));
      continue;
    }
    const A* unit_key = r.unit_key[b] + r.labels[b][n] * channels;
    const A* key = keys + i * channels;
    const A dcos = is_live(r.inv_norm[b][n]) ? g.dcos[b][n] : A(0);
    const A key_factor = -dcos * r.cosine[b][n] * r.inv_norm[b][n];
    for (int64_t c = 0; c < channels; ++c) out[c] = dcos * unit_key[c] + key_factor * key[c];
  }
}

// rows [m, C] += weight_n mean_grad[label_n], the gradient of the weighted sums.
template <class A>
void add_mean_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t first,
                   int64_t m, A* rows) {
  for (int64_t n = first; n < first + m; ++n)
    if (r.in_mask(b, n))
      add_scaled(token_weight(r, r.cosine[b][n]), g.mean_grad[b] + r.labels[b][n] * r.channels, r.channels,
                 rows + (n - first) * r.channels);
}

// Gradients of the tokens of a chunk, and their part of Wk's gradient: key_weight_sums [C, C] += key_grad^T
// tokens, key_bias_sums [C] += sum of key_grad.
template <class A>
void chunk_token_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t b, int64_t chunk,
                      TokenBuffers<A>& buffers, A* key_weight_sums, A* key_bias_sums) {
  const GemmOps<A>& gemm = gemm_of(A());
  const int64_t channels = r.channels;
  const Span span = chunk_span(r.tokens(), r.chunks, chunk);
  for (int64_t first = span.begin; first < span.end; first += kTile) {
    const int64_t m = span.end - first < kTile ? span.end - first : kTile;
    const A* tokens = r.shared ? load_tile<A>(r.values, b, first, m, channels, buffers.tokens) : nullptr;
    const A* keys = load_keys<A>(r, tokens, b, first, m, buffers.keys);
    if (g.dense)
      dense_key_grad(r, g, b, first, m, tokens, keys, buffers);
    else
      own_key_grad<A>(r, g, b, first, m, keys, buffers.key_grad);
    A* out = buffers.key_grad;
    if (g.key_packed != nullptr) {
      gemm.pack(tokens, channels, 1, m, channels, buffers.packed);
      gemm.run_at(buffers.key_grad, channels, buffers.packed, key_weight_sums, channels, channels, channels,
                  m, true);
      for (int64_t i = 0; i < m; ++i)
        add_scaled<A>(A(1), buffers.key_grad + i * channels, channels, key_bias_sums);
      out = buffers.token_grad;
      gemm.run(buffers.key_grad, channels, g.key_packed, out, channels, m, channels, channels, false);
    }
    if (r.shared) add_mean_grad(r, g, b, first, m, out);
    add_pooled_grad<A>(r, b, g.pooled_grad[b], first, m, out);
    store_tile<A>(out, g.keys_grad, b, first, m, channels);
    if (r.shared) continue;
    fill<A>(buffers.token_grad, m * channels, A(0));
    add_mean_grad<A>(r, g, b, first, m, buffers.token_grad);
    add_pooled_grad<A>(r, b, g.mean_grad[b], first, m, buffers.token_grad);
    store_tile<A>(buffers.token_grad, g.values_grad, b, first, m, channels);
  }
}

template <class A>
void token_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  TokenBuffers<A> buffers(r, g);
  const int64_t chunks = r.batch * r.chunks;
  const int64_t channels = r.channels;
  for (int64_t task = begin; task < end; ++task) {
    A* key_weight_sums = g.key_weight_sums + task * channels * channels;
    A* key_bias_sums = g.key_bias_sums + task * channels;
    if (g.key_packed != nullptr) {
      fill(key_weight_sums, channels * channels, A(0));
      fill(key_bias_sums, channels, A(0));
    }
    for (int64_t chunk = chunks * task / g.groups; chunk < chunks * (task + 1) / g.groups; ++chunk)
      chunk_token_grad<A>(r, g, chunk / r.chunks, chunk % r.chunks, buffers, key_weight_sums, key_bias_sums);
  }
}

template <class A>
void pack_means(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    gemm_of(A()).pack(r.pooled[b], r.channels, 1, r.centres(), r.channels, g.pooled_packed[b]);
    gemm_of(A()).pack(r.mean[b], r.channels, 1, r.centres(), r.channels, g.mean_packed[b]);
  }
}

// Rows first .. first + m of the gradient of Wk (which 0) or Wv (1), rows [m, C], and of its bias, bias [m]:
// dWk = sum key_grad^T tokens over tokens and pooled tokens, dWv = sum result_grad^T mean.
template <class A>
void weight_grad_rows(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int which, int64_t first,
                      int64_t m, A* rows, A* bias) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  const PerSample<A>& left = which == 0 ? g.pooled_key_grad : g.result_grad;
  const PerSample<A>& right = which == 0 ? g.pooled_packed : g.mean_packed;
  fill(rows, m * channels, A(0));
  fill(bias, m, A(0));
  for (int64_t k = 0; which == 0 && k < g.groups; ++k) {
    add_scaled(A(1), g.key_weight_sums + (k * channels + first) * channels, m * channels, rows);
    add_scaled(A(1), g.key_bias_sums + k * channels + first, m, bias);
  }
  for (int64_t b = 0; b < r.batch; ++b) {
    gemm_of(A()).run_at(left[b] + first, channels, right[b], rows, channels, m, channels, centres, true);
    for (int64_t o = 0; o < centres; ++o) add_scaled(A(1), left[b] + o * channels + first, m, bias);
  }
}

template <class A>
void weight_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t blocks = (channels + kCentreBlock - 1) / kCentreBlock;
  Scratch<A> rows(kCentreBlock * channels);
  Scratch<A> bias(kCentreBlock);
  for (int64_t task = begin; task < end; ++task) {
    const int which = static_cast<int>(task / blocks);
    const int64_t first = task % blocks * kCentreBlock;
    const int64_t m = channels - first < kCentreBlock ? channels - first : kCentreBlock;
    weight_grad_rows<A>(r, g, which, first, m, rows, bias);
    store_tile<A>(rows, g.weight_grad[which], 0, first, m, channels);
    TokenView at = g.bias_grad[which];
    // The bias is one row: b = 1 in store_tile() now addresses its elements from `first` on.
    at.batch = first;
    store_tile<A>(bias, at, 1, 0, 1, m);
  }
}

template <class A>
RoundGradOps<A> table() {
  return {mean_grad<A>, dcos<A>, pooled_key_grad<A>, token_grad<A>, pack_means<A>, weight_grad<A>};
}

}  // namespace

const RoundGradKernels& round_grad_kernels() {
  static const RoundGradKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
