#include "cluster/cpu/kernels.h"

#include "cluster/cpu/round_tile.h"

namespace frd {
namespace FRD_ISA {
namespace {

template <class A>
int64_t last_centres(const Dispatch<A>& d) {
  return d.rounds[d.count - 1].centres();
}

// ---- paper ----

// projected = query * Wk, offset = query . bk
template <class A>
void project_query(const Round<A>& r, const A* query, int64_t columns, A* projected, A* offset) {
  const int64_t channels = r.channels;
  for (int64_t j = 0; j < columns; ++j) {
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

template <class A>
void item_queries(const Dispatch<A>& d, int64_t b) {
  const int64_t columns = last_centres(d);
  for (int64_t t = d.count - 1; t >= 0; --t) {
    const Round<A>& r = d.rounds[t];
    const int64_t channels = r.channels;
    A* query = d.query[t][b];
    for (int64_t j = 0; j < columns; ++j) {
      A* row = query + j * channels;
      fill(row, channels, A(0));
      for (int64_t o = 0; o < r.centres(); ++o) {
        const A weight = t == d.count - 1 ? A(o == j) : d.product[t + 1][b][o * columns + j];
        if (t < d.count - 1 || o == j) add_scaled(weight, r.unit[b] + o * channels, channels, row);
      }
    }
    project_query(r, query, columns, d.projected[t][b], d.offset[t][b]);
    if (t == 0) return;
    const A* tokens = d.rounds[t - 1].result[b];
    for (int64_t n = 0; n < r.tokens(); ++n)
      for (int64_t j = 0; j < columns; ++j)
        d.product[t][b][n * columns + j] =
            r.scale[b][n] *
            (dot(tokens + n * channels, d.projected[t][b] + j * channels, channels) + d.offset[t][b][j]);
  }
}

template <class A>
void queries(const Dispatch<A>& d, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) item_queries<A>(d, b);
}

template <class A>
void dense(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const Round<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  const int64_t columns = d.dense.columns;
  Scratch<A> buffer(kTile * channels);
  Scratch<A> out(kTile * channels);
  Scratch<A> product(kTile * columns);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.chunks;
    const Span span = chunk_span(r.tokens(), r.chunks, u % r.chunks);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* tokens = load_tile<A>(r.values, b, first, m, channels, buffer);
      dense_product<A>(d.dense, b, tokens, r.scale[b] + first, m, channels, product);
      fill<A>(out, m * channels, A(0));
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < columns; ++j)
          add_scaled(sigmoid(d.dense.alpha * product[i * columns + j] + d.dense.beta),
                     d.dense.last[b] + j * channels, channels, out + i * channels);
      store_tile<A>(out, d.out, b, first, m, channels);
    }
  }
}

template <class A>
void dense_sums(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const Round<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  const int64_t columns = d.dense.columns;
  Scratch<A> tokens_buffer(kTile * channels);
  Scratch<A> grad_buffer(kTile * channels);
  Scratch<A> product(kTile * columns);
  Scratch<A> gate(kTile * columns);
  Scratch<A> argument(kTile * columns);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.chunks;
    const int64_t chunk = u % r.chunks;
    A* sums = d.sums[b] + chunk * columns * channels;
    A* query_sums = d.query_sums[b] + chunk * columns * channels;
    A* query_pulls = d.query_pulls[b] + chunk * columns;
    A* gate_grad = d.gate_grad[b] + chunk * 2;
    fill(sums, columns * channels, A(0));
    fill(query_sums, columns * channels, A(0));
    fill(query_pulls, columns, A(0));
    fill(gate_grad, 2, A(0));
    const Span span = chunk_span(r.tokens(), r.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* tokens = load_tile<A>(r.values, b, first, m, channels, tokens_buffer);
      const A* grad = load_tile<A>(d.grad, b, first, m, channels, grad_buffer);
      const A* scale = r.scale[b] + first;
      dense_product<A>(d.dense, b, tokens, scale, m, channels, product);
      dense_gate_grad<A>(d.dense, b, product, grad, m, channels, gate, argument);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = i * columns + j;
          const A pull = scale[i] * d.dense.alpha * argument[at];
          add_scaled(gate[at], grad + i * channels, channels, sums + j * channels);
          add_scaled(pull, tokens + i * channels, channels, query_sums + j * channels);
          query_pulls[j] += pull;
          gate_grad[0] += argument[at] * product[at];
          gate_grad[1] += argument[at];
        }
    }
  }
}

// query_grad [J, C] = sums * Wk^T + pulls bk
template <class A>
void lift_query_grad(const Round<A>& r, const A* sums, const A* pulls, int64_t columns, A* query_grad) {
  const int64_t channels = r.channels;
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t c = 0; c < channels; ++c)
      query_grad[j * channels + c] =
          r.key_weight == nullptr
              ? sums[j * channels + c]
              : dot(r.key_weight + c * channels, sums + j * channels, channels) + r.key_bias[c] * pulls[j];
}

template <class A>
void item_dense_centres(const Dispatch<A>& d, int64_t b, A* sums, A* pulls, A* query_grad) {
  const int64_t columns = last_centres(d);
  const int64_t channels = d.rounds[0].channels;
  const int64_t size = columns * channels;
  A* last_grad = d.gradients[d.count - 1].result_grad[b];
  fill(last_grad, size, A(0));
  fill(sums, size, A(0));
  fill(pulls, columns, A(0));
  for (int64_t k = 0; k < d.rounds[0].chunks; ++k) {
    add_scaled(A(1), d.sums[b] + k * size, size, last_grad);
    add_scaled(A(1), d.query_sums[b] + k * size, size, sums);
    add_scaled(A(1), d.query_pulls[b] + k * columns, columns, pulls);
  }
  for (int64_t t = 0; t < d.count; ++t) {
    const Round<A>& r = d.rounds[t];
    if (t > 0) {
      const A* tokens = d.rounds[t - 1].result[b];
      fill(sums, size, A(0));
      fill(pulls, columns, A(0));
      for (int64_t n = 0; n < r.tokens(); ++n)
        for (int64_t j = 0; j < columns; ++j) {
          const A pull = r.scale[b][n] * d.gradients[t].product_grad[b][n * columns + j];
          add_scaled(pull, tokens + n * channels, channels, sums + j * channels);
          pulls[j] += pull;
        }
    }
    lift_query_grad(r, sums, pulls, columns, query_grad);
    A* unit_grad = d.gradients[t].unit_grad[b];
    if (t == d.count - 1) {
      for (int64_t i = 0; i < size; ++i) unit_grad[i] = query_grad[i];
      return;
    }
    fill(unit_grad, r.centres() * channels, A(0));
    for (int64_t o = 0; o < r.centres(); ++o)
      for (int64_t j = 0; j < columns; ++j) {
        add_scaled(d.product[t + 1][b][o * columns + j], query_grad + j * channels, channels,
                   unit_grad + o * channels);
        d.gradients[t + 1].product_grad[b][o * columns + j] =
            dot(r.unit[b] + o * channels, query_grad + j * channels, channels);
      }
  }
}

template <class A>
void dense_centres(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t columns = last_centres(d);
  const int64_t channels = d.rounds[0].channels;
  Scratch<A> sums(columns * channels);
  Scratch<A> pulls(columns);
  Scratch<A> query_grad(columns * channels);
  for (int64_t b = begin; b < end; ++b) item_dense_centres<A>(d, b, sums, pulls, query_grad);
}

// ---- released ----

// For every centre of round 1: the product of the similarities along its chain through the later rounds, and
// the last centre it ends in.
template <class A>
void follow_chains(const Dispatch<A>& d, int64_t b, A* weight, int32_t* last) {
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

template <class A>
void masked(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const Round<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  Scratch<A> out(kTile * channels);
  Scratch<A> chain(r.centres());
  Scratch<int32_t> last(r.centres());
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.chunks;
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    const Span span = chunk_span(r.tokens(), r.chunks, u % r.chunks);
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

template <class A>
void masked_sums(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const Round<A>& r = d.rounds[0];
  const int64_t channels = r.channels;
  Scratch<A> buffer(kTile * channels);
  Scratch<A> chain(r.centres());
  Scratch<int32_t> last(r.centres());
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / r.chunks;
    const int64_t chunk = u % r.chunks;
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    A* sums = d.sums[b] + chunk * r.centres() * channels;
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

template <class A>
void masked_centres(const Dispatch<A>& d, int64_t begin, int64_t end) {
  const Round<A>& first = d.rounds[0];
  const int64_t channels = first.channels;
  const int64_t columns = last_centres(d);
  int64_t most = first.centres();
  for (int64_t t = 1; t < d.count; ++t)
    if (d.rounds[t].centres() > most) most = d.rounds[t].centres();
  Scratch<A> chain(first.centres());
  Scratch<A> sum(channels);
  Scratch<A> grad(most);
  Scratch<A> next(most);
  Scratch<A> tail(most);
  Scratch<int32_t> last(first.centres());
  for (int64_t b = begin; b < end; ++b) {
    follow_chains<A>(d, b, chain, last);
    const A* centres = d.rounds[d.count - 1].result[b];
    A* last_grad = d.gradients[d.count - 1].result_grad[b];
    fill(last_grad, columns * channels, A(0));
    for (int64_t o = 0; o < first.centres(); ++o) {
      fill<A>(sum, channels, A(0));
      for (int64_t k = 0; k < first.chunks; ++k)
        add_scaled<A>(A(1), d.sums[b] + (k * first.centres() + o) * channels, channels, sum);
      add_scaled<A>(chain[o], sum, channels, last_grad + last[o] * channels);
      grad[o] = dot<A>(sum, centres + last[o] * channels, channels);
    }
    // grad [tokens of round t]: gradient of the product of the similarities from round t on
    for (int64_t t = 1; t < d.count; ++t) {
      const Round<A>& r = d.rounds[t];
      for (int64_t o = 0; o < r.centres(); ++o) {
        next[o] = 0;
        tail[o] = 1;
        int32_t at = static_cast<int32_t>(o);
        for (int64_t later = t + 1; later < d.count; ++later) {
          tail[o] *= token_weight(d.rounds[later], d.rounds[later].cosine[b][at]);
          at = d.rounds[later].labels[b][at];
        }
      }
      for (int64_t n = 0; n < r.tokens(); ++n) {
        const int32_t label = r.labels[b][n];
        d.gradients[t].similarity_grad[b][n] = grad[n] * tail[label];
        next[label] += grad[n] * token_weight(r, r.cosine[b][n]);
      }
      for (int64_t o = 0; o < r.centres(); ++o) grad[o] = next[o];
    }
  }
}

template <class A>
DispatchOps<A> table() {
  return {queries<A>,     dense<A>,         masked<A>,        dense_sums<A>,
          masked_sums<A>, dense_centres<A>, masked_centres<A>};
}

}  // namespace

const DispatchKernels& dispatch_kernels() {
  static const DispatchKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
