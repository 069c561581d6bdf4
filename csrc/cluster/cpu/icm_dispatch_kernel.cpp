// Stages of the ICM's dispatch, see IcmDispatchOps: dense as in the paper, masked as in the released code.
#include "cluster/cpu/kernels.h"

#include "cluster/cpu/tiles.h"

namespace frd {
namespace FRD_ISA {
namespace {

template <class A>
int64_t last_centre_count(const IcmDispatch<A>& d) {
  return d.rounds[d.count - 1].centres();
}

// projected [J, C] = query Wk, offset [J] = query bk, for query [J, C].
template <class A>
void project_query(const ClusterRound<A>& r, const A* query, int64_t last_centres, A* projected, A* offset) {
  const int64_t channels = r.channels;
  for (int64_t j = 0; j < last_centres; ++j) {
    const A* q = query + j * channels;
    A* row = projected + j * channels;
    offset[j] = 0;
    if (r.key_weight == nullptr) {
      for (int64_t c = 0; c < channels; ++c) row[c] = q[c];
      continue;
    }
    fill(row, channels, A(0));
    for (int64_t c = 0; c < channels; ++c) add_scaled(q[c], r.key_weight + c * channels, channels, row);
    offset[j] = dot(q, r.key_bias, channels);
  }
}

// From the last round to the first: query_t = P_{t+1}^T unit_key_t, P_t = inv_norm (tokens projected^T +
// offset).
template <class A>
void sample_queries(const IcmDispatch<A>& d, int64_t b) {
  const int64_t last_centres = last_centre_count(d);
  for (int64_t t = d.count - 1; t >= 0; --t) {
    const ClusterRound<A>& r = d.rounds[t];
    const int64_t channels = r.channels;
    A* query = d.query[t][b];
    for (int64_t j = 0; j < last_centres; ++j) {
      A* row = query + j * channels;
      fill(row, channels, A(0));
      for (int64_t o = 0; o < r.centres(); ++o) {
        const A weight = t == d.count - 1 ? A(o == j) : d.product[t + 1][b][o * last_centres + j];
        if (t < d.count - 1 || o == j) add_scaled(weight, r.unit_key[b] + o * channels, channels, row);
      }
    }
    project_query(r, query, last_centres, d.projected[t][b], d.offset[t][b]);
    if (t == 0) return;
    const A* tokens = d.rounds[t - 1].result[b];
    for (int64_t n = 0; n < r.tokens(); ++n)
      for (int64_t j = 0; j < last_centres; ++j)
        d.product[t][b][n * last_centres + j] =
            r.inv_norm[b][n] *
            (dot(tokens + n * channels, d.projected[t][b] + j * channels, channels) + d.offset[t][b][j]);
  }
}

template <class A>
void queries(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) sample_queries<A>(d, b);
}

// out = sigmoid(alpha P_1 + beta) R
template <class A>
void dense(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const ClusterRound<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  const int64_t last_centres = d.dense.last_centres;
  Scratch<A> buffer(kTile * channels);
  Scratch<A> out(kTile * channels);
  Scratch<A> product(kTile * last_centres);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.chunks;
    const Span span = chunk_span(r.tokens(), r.chunks, task % r.chunks);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* tokens = load_tile<A>(r.values, b, first, m, channels, buffer);
      dense_product<A>(d.dense, b, tokens, r.inv_norm[b] + first, m, channels, product);
      fill<A>(out, m * channels, A(0));
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < last_centres; ++j)
          add_scaled(sigmoid(d.dense.alpha * product[i * last_centres + j] + d.dense.beta),
                     d.dense.last[b] + j * channels, channels, out + i * channels);
      store_tile<A>(out, d.out, b, first, m, channels);
    }
  }
}

// Sums over the tokens: gate^T grad, (dS inv_norm)^T tokens, dS inv_norm, and the gradients of alpha and
// beta.
template <class A>
void dense_grad_sums(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const ClusterRound<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  const int64_t last_centres = d.dense.last_centres;
  Scratch<A> tokens_buffer(kTile * channels);
  Scratch<A> grad_buffer(kTile * channels);
  Scratch<A> product(kTile * last_centres);
  Scratch<A> gate(kTile * last_centres);
  Scratch<A> argument_grad(kTile * last_centres);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.chunks;
    const int64_t chunk = task % r.chunks;
    A* sums = d.grad_sums[b] + chunk * last_centres * channels;
    A* query_sums = d.query_sums[b] + chunk * last_centres * channels;
    A* query_dcos_sums = d.query_dcos_sums[b] + chunk * last_centres;
    A* gate_grad = d.gate_grad[b] + chunk * 2;
    fill(sums, last_centres * channels, A(0));
    fill(query_sums, last_centres * channels, A(0));
    fill(query_dcos_sums, last_centres, A(0));
    fill(gate_grad, 2, A(0));
    const Span span = chunk_span(r.tokens(), r.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* tokens = load_tile<A>(r.values, b, first, m, channels, tokens_buffer);
      const A* grad = load_tile<A>(d.grad, b, first, m, channels, grad_buffer);
      const A* inv_norm = r.inv_norm[b] + first;
      dense_product<A>(d.dense, b, tokens, inv_norm, m, channels, product);
      dense_gate_grad<A>(d.dense, b, product, grad, m, channels, gate, argument_grad);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < last_centres; ++j) {
          const int64_t at = i * last_centres + j;
          const A dcos = inv_norm[i] * d.dense.alpha * argument_grad[at];
          add_scaled(gate[at], grad + i * channels, channels, sums + j * channels);
          add_scaled(dcos, tokens + i * channels, channels, query_sums + j * channels);
          query_dcos_sums[j] += dcos;
          gate_grad[0] += argument_grad[at] * product[at];
          gate_grad[1] += argument_grad[at];
        }
    }
  }
}

// query_grad [J, C] = token_sums Wk^T + dcos_sums bk, for token_sums [J, C] and dcos_sums [J].
template <class A>
void project_query_grad(const ClusterRound<A>& r, const A* token_sums, const A* dcos_sums,
                        int64_t last_centres, A* query_grad) {
  const int64_t channels = r.channels;
  for (int64_t j = 0; j < last_centres; ++j)
    for (int64_t c = 0; c < channels; ++c)
      query_grad[j * channels + c] =
          r.key_weight == nullptr ? token_sums[j * channels + c]
                                  : dot(r.key_weight + c * channels, token_sums + j * channels, channels) +
                                        r.key_bias[c] * dcos_sums[j];
}

// From the first round to the last: unit_key_grad_t = P_{t+1} query_grad_t, dP_{t+1} = unit_key_t
// query_grad_t^T.
template <class A>
void sample_dense_centre_grad(const IcmDispatch<A>& d, int64_t b, A* sums, A* dcos_sums, A* query_grad) {
  const int64_t last_centres = last_centre_count(d);
  const int64_t channels = d.rounds[0].channels;
  const int64_t size = last_centres * channels;
  A* last_grad = d.gradients[d.count - 1].result_grad[b];
  fill(last_grad, size, A(0));
  fill(sums, size, A(0));
  fill(dcos_sums, last_centres, A(0));
  for (int64_t k = 0; k < d.rounds[0].chunks; ++k) {
    add_scaled(A(1), d.grad_sums[b] + k * size, size, last_grad);
    add_scaled(A(1), d.query_sums[b] + k * size, size, sums);
    add_scaled(A(1), d.query_dcos_sums[b] + k * last_centres, last_centres, dcos_sums);
  }
  for (int64_t t = 0; t < d.count; ++t) {
    const ClusterRound<A>& r = d.rounds[t];
    if (t > 0) {
      const A* tokens = d.rounds[t - 1].result[b];
      fill(sums, size, A(0));
      fill(dcos_sums, last_centres, A(0));
      for (int64_t n = 0; n < r.tokens(); ++n)
        for (int64_t j = 0; j < last_centres; ++j) {
          const A dcos = r.inv_norm[b][n] * d.gradients[t].product_grad[b][n * last_centres + j];
          add_scaled(dcos, tokens + n * channels, channels, sums + j * channels);
          dcos_sums[j] += dcos;
        }
    }
    project_query_grad(r, sums, dcos_sums, last_centres, query_grad);
    A* unit_key_grad = d.gradients[t].unit_key_grad[b];
    if (t == d.count - 1) {
      for (int64_t i = 0; i < size; ++i) unit_key_grad[i] = query_grad[i];
      return;
    }
    fill(unit_key_grad, r.centres() * channels, A(0));
    for (int64_t o = 0; o < r.centres(); ++o)
      for (int64_t j = 0; j < last_centres; ++j) {
        add_scaled(d.product[t + 1][b][o * last_centres + j], query_grad + j * channels, channels,
                   unit_key_grad + o * channels);
        d.gradients[t + 1].product_grad[b][o * last_centres + j] =
            dot(r.unit_key[b] + o * channels, query_grad + j * channels, channels);
      }
  }
}

template <class A>
void dense_centre_grad(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t last_centres = last_centre_count(d);
  const int64_t channels = d.rounds[0].channels;
  Scratch<A> sums(last_centres * channels);
  Scratch<A> dcos_sums(last_centres);
  Scratch<A> query_grad(last_centres * channels);
  for (int64_t b = begin; b < end; ++b) sample_dense_centre_grad<A>(d, b, sums, dcos_sums, query_grad);
}

// For every centre of round 1: weight [O_1], the product of the similarities on its way through the later
// rounds, and last [O_1], the centre of the last round that it ends in.
template <class A>
void follow_chains(const IcmDispatch<A>& d, int64_t b, A* weight, int32_t* last) {
  for (int64_t o = 0; o < d.rounds[0].centres(); ++o) {
    int32_t at = static_cast<int32_t>(o);
    A w = 1;
    for (int64_t t = 1; t < d.count; ++t) {
      w *= token_weight(d.rounds[t], d.rounds[t].cosine[b][at]);
      at = d.rounds[t].labels[b][at];
    }
    weight[o] = w;
    last[o] = at;
  }
}

// out_n = weight_n chain_weight[label_n] centre[last[label_n]]
template <class A>
void masked(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const ClusterRound<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  Scratch<A> out(kTile * channels);
  Scratch<A> chain(r.centres());
  Scratch<int32_t> last(r.centres());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.chunks;
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    const Span span = chunk_span(r.tokens(), r.chunks, task % r.chunks);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      for (int64_t i = 0; i < m; ++i) {
        const int32_t label = r.labels[b][first + i];
        const A weight = token_weight(r, r.cosine[b][first + i]) * chain[label];
        const A* centre = centres + last[label] * channels;
        for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = weight * centre[c];
      }
      store_tile<A>(out, d.out, b, first, m, channels);
    }
  }
}

// similarity_grad_n = chain_weight (grad_n . centre), grad_sums_o = sum of weight_n grad_n over the cluster.
template <class A>
void masked_grad_sums(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const ClusterRound<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  Scratch<A> buffer(kTile * channels);
  Scratch<A> chain(r.centres());
  Scratch<int32_t> last(r.centres());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.chunks;
    const int64_t chunk = task % r.chunks;
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    A* sums = d.grad_sums[b] + chunk * r.centres() * channels;
    fill(sums, r.centres() * channels, A(0));
    const Span span = chunk_span(r.tokens(), r.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* grad = load_tile<A>(d.grad, b, first, m, channels, buffer);
      for (int64_t i = 0; i < m; ++i) {
        const int32_t label = r.labels[b][first + i];
        const A* row = grad + i * channels;
        d.gradients[0].similarity_grad[b][first + i] =
            chain[label] * dot(row, centres + last[label] * channels, channels);
        add_scaled(token_weight(r, r.cosine[b][first + i]), row, channels, sums + label * channels);
      }
    }
  }
}

// Gradients of the last centres, and by the product rule of the similarities of the rounds from 2 on.
template <class A>
void masked_centre_grad(const IcmDispatch<A>& d, int64_t begin, int64_t end) {
  const ClusterRound<A>& first = d.rounds[0];
  const int64_t channels = first.channels;
  const int64_t last_centres = last_centre_count(d);
  int64_t max_centres = first.centres();
  for (int64_t t = 1; t < d.count; ++t)
    if (d.rounds[t].centres() > max_centres) max_centres = d.rounds[t].centres();
  Scratch<A> chain(first.centres());
  Scratch<A> sum(channels);
  Scratch<A> grad(max_centres);
  Scratch<A> next(max_centres);
  Scratch<A> later_weight(max_centres);
  Scratch<int32_t> last(first.centres());
  for (int64_t b = begin; b < end; ++b) {
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    A* last_grad = d.gradients[d.count - 1].result_grad[b];
    fill(last_grad, last_centres * channels, A(0));
    for (int64_t o = 0; o < first.centres(); ++o) {
      fill<A>(sum, channels, A(0));
      for (int64_t k = 0; k < first.chunks; ++k)
        add_scaled<A>(A(1), d.grad_sums[b] + (k * first.centres() + o) * channels, channels, sum);
      add_scaled<A>(chain[o], sum, channels, last_grad + last[o] * channels);
      grad[o] = dot<A>(sum, centres + last[o] * channels, channels);
    }
    // grad [tokens of round t]: gradient of the product of the similarities from round t on.
    for (int64_t t = 1; t < d.count; ++t) {
      const ClusterRound<A>& r = d.rounds[t];
      for (int64_t o = 0; o < r.centres(); ++o) {
        next[o] = 0;
        later_weight[o] = 1;
        int32_t at = static_cast<int32_t>(o);
        for (int64_t later = t + 1; later < d.count; ++later) {
          later_weight[o] *= token_weight(d.rounds[later], d.rounds[later].cosine[b][at]);
          at = d.rounds[later].labels[b][at];
        }
      }
      for (int64_t n = 0; n < r.tokens(); ++n) {
        const int32_t label = r.labels[b][n];
        d.gradients[t].similarity_grad[b][n] = grad[n] * later_weight[label];
        next[label] += grad[n] * token_weight(r, r.cosine[b][n]);
      }
      for (int64_t o = 0; o < r.centres(); ++o) grad[o] = next[o];
    }
  }
}

template <class A>
IcmDispatchOps<A> table() {
  return {queries<A>,           dense<A>,  dense_grad_sums<A>,
          dense_centre_grad<A>, masked<A>, masked_grad_sums<A>,
          masked_centre_grad<A>};
}

}  // namespace

const IcmDispatchKernels& icm_dispatch_kernels() {
  static const IcmDispatchKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
