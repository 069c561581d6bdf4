#include "cluster/cpu/kernels.h"

#include "cluster/cpu/round_tile.h"

namespace frd {
namespace FRD_ISA {
namespace {

// The centres of item b as rows [O, C] of the compute type; in place where they are that, else in `buffer`.
template <class A>
const A* load_centres(const ClusterDispatch<A>& d, int64_t b, A* buffer) {
  return load_tile(d.rows, b, 0, d.centres, d.channels, buffer);
}

template <class A>
void forward(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  Scratch<A> buffer(d.centres * channels);
  Scratch<A> tile(kTile * channels);
  const A* rows = nullptr;
  int64_t item = -1;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / d.chunks;
    if (b != item) rows = load_centres<A>(d, b, buffer);
    item = b;
    const Span span = chunk_span(d.tokens, d.chunks, u % d.chunks);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      for (int64_t i = 0; i < m; ++i) {
        const int32_t label = d.labels[b][first + i];
        A* out = tile + i * channels;
        if (label < 0) {
          fill(out, channels, A(0));
          continue;
        }
        const A factor = d.similarity[b][first + i];
        const A* row = rows + label * channels;
        for (int64_t c = 0; c < channels; ++c) out[c] = factor * row[c];
      }
      store_tile<A>(tile, d.out, b, first, m, channels);
    }
  }
}

template <class A>
void sum(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  const int64_t size = d.centres * channels;
  Scratch<A> buffer(size);
  Scratch<A> tile(kTile * channels);
  const A* rows = nullptr;
  int64_t item = -1;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / d.chunks;
    const int64_t chunk = u % d.chunks;
    if (b != item) rows = load_centres<A>(d, b, buffer);
    item = b;
    A* sums = d.sums[b] + chunk * size;
    fill(sums, size, A(0));
    const Span span = chunk_span(d.tokens, d.chunks, chunk);
    for (int64_t first = span.begin; first < span.end; first += kTile) {
      const int64_t m = span.end - first < kTile ? span.end - first : kTile;
      const A* grad = load_tile<A>(d.grad, b, first, m, channels, tile);
      for (int64_t i = 0; i < m; ++i) {
        const int32_t label = d.labels[b][first + i];
        d.similarity_grad[b][first + i] = 0;
        if (label < 0) continue;
        const A* row = grad + i * channels;
        d.similarity_grad[b][first + i] = dot(row, rows + label * channels, channels);
        add_scaled(d.similarity[b][first + i], row, channels, sums + label * channels);
      }
    }
  }
}

template <class A>
void rows_grad(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  Scratch<A> block(kCentreBlock * channels);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / d.blocks();
    const int64_t first = u % d.blocks() * kCentreBlock;
    const int64_t m = d.centres - first < kCentreBlock ? d.centres - first : kCentreBlock;
    fill<A>(block, m * channels, A(0));
    for (int64_t k = 0; k < d.chunks; ++k)
      add_scaled<A>(A(1), d.sums[b] + (k * d.centres + first) * channels, m * channels, block);
    store_tile<A>(block, d.rows_grad, b, first, m, channels);
  }
}

template <class A>
ClusterDispatchOps<A> table() {
  return {forward<A>, sum<A>, rows_grad<A>};
}

}  // namespace

const ClusterDispatchKernels& cluster_dispatch_kernels() {
  static const ClusterDispatchKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
