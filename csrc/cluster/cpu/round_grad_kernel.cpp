#include "cluster/cpu/kernels.h"

#include "cluster/cpu/round_tile.h"

namespace frd {
namespace FRD_ISA {
namespace {

template <class A>
void mean_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.blocks();
    const int64_t first = u % r.blocks() * kCentreBlock;
    const int64_t m = centres - first < kCentreBlock ? centres - first : kCentreBlock;
    const A* result_grad = g.result_grad[b] + first * channels;
    A* out = g.mean_grad[b] + first * channels;
    if (g.value_rows != nullptr)
      gemm_of(A()).run(result_grad, channels, g.value_rows, out, channels, m, channels, channels, false);
    else
      for (int64_t c = 0; c < m * channels; ++c) out[c] = result_grad[c];
    for (int64_t i = 0; i < m; ++i) {
      A* row = out + i * channels;
      for (int64_t c = 0; c < channels; ++c) row[c] /= r.mass[b][first + i];
      g.mean_dot[b][first + i] = dot(row, r.mean[b] + (first + i) * channels, channels);
    }
  }
}

// Gradient of the own cosine of token n with value row `value`; adds those of alpha and beta to gate_grad.
template <class A>
A cosine_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t n, const A* value, A* gate_grad) {
  const A similarity_grad = g.similarity_grad[b][n];
  if (!r.weighted) return similarity_grad;
  const int32_t label = r.labels[b][n];
  const A cosine = r.cosine[b][n];
  const A weight = token_weight(r, cosine);
  const A pulled = dot(value, g.mean_grad[b] + label * r.channels, r.channels) - g.mean_dot[b][label];
  const A argument_grad = (similarity_grad + pulled) * weight * (A(1) - weight);
  gate_grad[0] += argument_grad * cosine;
  gate_grad[1] += argument_grad;
  return r.alpha * argument_grad;
}

template <class A>
void pulls(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  Scratch<A> values_buffer(kTile * channels);
  Scratch<A> keys_buffer(kTile * channels);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.chunks;
    const int64_t chunk = u % r.chunks;
    A* sums = g.sums[b] + chunk * centres * channels;
    A* pulls = g.pulls[b] + chunk * centres;
    A* gate_grad = g.gate_grad[b] + chunk * 2;
    fill(sums, centres * channels, A(0));
    fill(pulls, centres, A(0));
    fill(gate_grad, 2, A(0));
    const Span span = chunk_span(r.tokens(), r.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* values = nullptr;
      if (r.weighted || r.shared) values = load_tile<A>(r.values, b, first, m, channels, values_buffer);
      // before their projection, which is linear and applied to the sums
      const A* keys = r.shared ? values : load_tile<A>(r.keys, b, first, m, channels, keys_buffer);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t n = first + i;
        if (!r.takes_part(b, n)) {
          g.pull[b][n] = 0;
          continue;
        }
        const A pull = cosine_grad(r, g, b, n, values + i * channels, gate_grad) * r.scale[b][n];
        const int32_t label = r.labels[b][n];
        g.pull[b][n] = pull;
        pulls[label] += pull;
        add_scaled(pull, keys + i * channels, channels, sums + label * channels);
      }
    }
  }
}

// Sums the chunks of `pulls` for m centres from `first`, through the key projection: unit_grad [m, C].
template <class A>
void gather_unit_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t first, int64_t m, A* sums,
                      A* unit_grad) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  for (int64_t i = 0; i < m; ++i) {
    A* sum = sums + i * channels;
    A pull = 0;
    fill(sum, channels, A(0));
    for (int64_t k = 0; k < r.chunks; ++k) {
      pull += g.pulls[b][k * centres + first + i];
      add_scaled(A(1), g.sums[b] + (k * centres + first + i) * channels, channels, sum);
    }
    A* out = unit_grad + i * channels;
    for (int64_t c = 0; c < channels; ++c) out[c] = r.key_packed == nullptr ? sum[c] : pull * r.key_bias[c];
  }
  if (r.key_packed != nullptr)
    gemm_of(A()).run(sums, channels, r.key_packed, unit_grad, channels, m, channels, channels, true);
}

template <class A>
void centre_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  Scratch<A> sums(kCentreBlock * channels);
  Scratch<A> gathered(kCentreBlock * channels);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.blocks();
    const int64_t first = u % r.blocks() * kCentreBlock;
    const int64_t m = centres - first < kCentreBlock ? centres - first : kCentreBlock;
    const A* unit_grad = gathered;
    if (g.dense)
      unit_grad = g.unit_grad[b] + first * channels;
    else
      gather_unit_grad<A>(r, g, b, first, m, sums, gathered);
    A* key_grad = g.centre_grad[b] + first * channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* unit = r.unit[b] + (first + i) * channels;
      const A* in = unit_grad + i * channels;
      const A scale = is_live(r.unit_scale[b][first + i]) ? r.unit_scale[b][first + i] : A(0);
      const A along = dot(unit, in, channels);
      for (int64_t c = 0; c < channels; ++c) key_grad[i * channels + c] = (in[c] - unit[c] * along) * scale;
    }
    A* out = g.pooled_grad[b] + first * channels;
    const A* of_mean = g.mean_grad[b] + first * channels;
    const bool projected = g.key_rows != nullptr;
    for (int64_t c = 0; c < m * channels; ++c)
      out[c] = (r.shared ? of_mean[c] : A(0)) + (projected ? A(0) : key_grad[c]);
    if (projected)
      gemm_of(A()).run(key_grad, channels, g.key_rows, out, channels, m, channels, channels, true);
  }
}

// rows [m, C] += what the bins that cover the tokens first .. first + m pass on of the gradient of their
// means.
template <class A>
void add_pooled_grad(const Round<A>& r, int64_t b, const A* bins, int64_t first, int64_t m, A* rows) {
  for (int64_t n = first; n < first + m; ++n) {
    if (!r.takes_part(b, n)) continue;
    const int64_t y = n / r.width;
    const int64_t x = n % r.width;
    for (int64_t i = first_bin(y, r.height, r.rows); i <= last_bin(y, r.height, r.rows); ++i)
      for (int64_t j = first_bin(x, r.width, r.columns); j <= last_bin(x, r.width, r.columns); ++j) {
        const int64_t bin = i * r.columns + j;
        add_scaled(r.share[b][bin], bins + bin * r.channels, r.channels, rows + (n - first) * r.channels);
      }
  }
}

template <class A>
struct TokenBuffers {
  Scratch<A> tokens, keys, key_grad, token_grad, packed, grad, product, product_grad, gate;
  TokenBuffers(const Round<A>& r, const RoundGrad<A>& g)
      : tokens(kTile * r.channels),
        keys(kTile * r.channels),
        key_grad(kTile * r.channels),
        token_grad(kTile * r.channels),
        packed(gemm_of(A()).packed_size(kTile, r.channels)),
        grad(kTile * r.channels),
        product(kTile * g.columns),
        product_grad(kTile * g.columns),
        gate(kTile * g.columns) {}
};

// key_grad [m, C] from the gradient of the product of the cosines.
template <class A>
void dense_key_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t first, int64_t m,
                    const A* tokens, const A* keys, TokenBuffers<A>& buffers) {
  const int64_t channels = r.channels;
  const int64_t columns = g.columns;
  const A* scale = r.scale[b] + first;
  const A *product, *product_grad;
  if (g.dispatch != nullptr) {
    const A* grad = load_tile<A>(g.dispatch->grad, b, first, m, channels, buffers.grad);
    dense_product<A>(*g.dispatch, b, tokens, scale, m, channels, buffers.product);
    dense_gate_grad<A>(*g.dispatch, b, buffers.product, grad, m, channels, buffers.gate,
                       buffers.product_grad);
    for (int64_t i = 0; i < m * columns; ++i) buffers.product_grad[i] *= g.dispatch->alpha;
    product = buffers.product;
    product_grad = buffers.product_grad;
  } else {
    product = g.product[b] + first * columns;
    product_grad = g.product_grad[b] + first * columns;
  }
  for (int64_t i = 0; i < m; ++i) {
    A* out = buffers.key_grad + i * channels;
    const A live = is_live(scale[i]) ? scale[i] : A(0);
    A along = 0;
    for (int64_t j = 0; j < columns; ++j) along += product[i * columns + j] * product_grad[i * columns + j];
    const A back = -along * scale[i] * live;
    for (int64_t c = 0; c < channels; ++c) out[c] = back * keys[i * channels + c];
    for (int64_t j = 0; j < columns; ++j)
      add_scaled(live * product_grad[i * columns + j], g.query[b] + j * channels, channels, out);
  }
}

// key_grad [m, C] from the gradient of the own cosine.
template <class A>
void own_key_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t first, int64_t m,
                  const A* keys, A* key_grad) {
  const int64_t channels = r.channels;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t n = first + i;
    A* out = key_grad + i * channels;
    if (!r.takes_part(b, n)) {
      fill(out, channels, A(0));
      continue;
    }
    const A* unit = r.unit[b] + r.labels[b][n] * channels;
    const A* key = keys + i * channels;
    const A pull = is_live(r.scale[b][n]) ? g.pull[b][n] : A(0);
    const A back = -pull * r.cosine[b][n] * r.scale[b][n];
    for (int64_t c = 0; c < channels; ++c) out[c] = pull * unit[c] + back * key[c];
  }
}

// rows [m, C] += the gradient of the tokens' weighted sums
template <class A>
void add_mean_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t first, int64_t m, A* rows) {
  for (int64_t n = first; n < first + m; ++n)
    if (r.takes_part(b, n))
      add_scaled(token_weight(r, r.cosine[b][n]), g.mean_grad[b] + r.labels[b][n] * r.channels, r.channels,
                 rows + (n - first) * r.channels);
}

template <class A>
void chunk_token_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t b, int64_t chunk,
                      TokenBuffers<A>& buffers, A* weight_sums, A* bias_sums) {
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
    if (g.key_rows != nullptr) {
      gemm.pack(tokens, channels, 1, m, channels, buffers.packed);
      gemm.run_at(buffers.key_grad, channels, buffers.packed, weight_sums, channels, channels, channels, m,
                  true);
      for (int64_t i = 0; i < m; ++i)
        add_scaled<A>(A(1), buffers.key_grad + i * channels, channels, bias_sums);
      out = buffers.token_grad;
      gemm.run(buffers.key_grad, channels, g.key_rows, out, channels, m, channels, channels, false);
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
void token_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  TokenBuffers<A> buffers(r, g);
  const int64_t pieces = r.batch * r.chunks;
  const int64_t channels = r.channels;
  for (int64_t u = begin; u < end; ++u) {
    A* weight_sums = g.weight_sums + u * channels * channels;
    A* bias_sums = g.bias_sums + u * channels;
    if (g.key_rows != nullptr) {
      fill(weight_sums, channels * channels, A(0));
      fill(bias_sums, channels, A(0));
    }
    for (int64_t piece = pieces * u / g.groups; piece < pieces * (u + 1) / g.groups; ++piece)
      chunk_token_grad<A>(r, g, piece / r.chunks, piece % r.chunks, buffers, weight_sums, bias_sums);
  }
}

template <class A>
void pack_means(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    gemm_of(A()).pack(r.pooled[b], r.channels, 1, r.centres(), r.channels, g.pooled_packed[b]);
    gemm_of(A()).pack(r.mean[b], r.channels, 1, r.centres(), r.channels, g.mean_packed[b]);
  }
}

// Rows first .. first + m of the gradient of Wk (which 0) or Wv (1), and as many elements of the bias's.
template <class A>
void weight_grad_rows(const Round<A>& r, const RoundGrad<A>& g, int which, int64_t first, int64_t m, A* rows,
                      A* bias) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  const PerItem<A>& left = which == 0 ? g.centre_grad : g.result_grad;
  const PerItem<A>& right = which == 0 ? g.pooled_packed : g.mean_packed;
  fill(rows, m * channels, A(0));
  fill(bias, m, A(0));
  for (int64_t k = 0; which == 0 && k < g.groups; ++k) {
    add_scaled(A(1), g.weight_sums + (k * channels + first) * channels, m * channels, rows);
    add_scaled(A(1), g.bias_sums + k * channels + first, m, bias);
  }
  for (int64_t b = 0; b < r.batch; ++b) {
    gemm_of(A()).run_at(left[b] + first, channels, right[b], rows, channels, m, channels, centres, true);
    for (int64_t o = 0; o < centres; ++o) add_scaled(A(1), left[b] + o * channels + first, m, bias);
  }
}

template <class A>
void weight_grad(const Round<A>& r, const RoundGrad<A>& g, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t blocks = (channels + kCentreBlock - 1) / kCentreBlock;
  Scratch<A> rows(kCentreBlock * channels);
  Scratch<A> bias(kCentreBlock);
  for (int64_t u = begin; u < end; ++u) {
    const int which = static_cast<int>(u / blocks);
    const int64_t first = u % blocks * kCentreBlock;
    const int64_t m = channels - first < kCentreBlock ? channels - first : kCentreBlock;
    weight_grad_rows<A>(r, g, which, first, m, rows, bias);
    store_tile<A>(rows, g.weight_grad[which], 0, first, m, channels);
    TokenView at = g.bias_grad[which];
    at.batch = first;  // the bias is one row; its elements from `first` on
    store_tile<A>(bias, at, 1, 0, 1, m);
  }
}

template <class A>
RoundGradOps<A> table() {
  return {mean_grad<A>, pulls<A>, centre_grad<A>, token_grad<A>, pack_means<A>, weight_grad<A>};
}

}  // namespace

const RoundGradKernels& round_grad_kernels() {
  static const RoundGradKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
