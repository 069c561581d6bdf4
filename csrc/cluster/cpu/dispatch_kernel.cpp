// Stages of the operator `cluster_dispatch`, see ClusterDispatchOps.
#include "cluster/cpu/kernels.h"

#include "cluster/cpu/tiles.h"

namespace frd {
namespace FRD_ISA {
namespace {

// The centres [O, C] of sample b in the compute type: a pointer to them if they have it, else to `buffer`.
template <class A>
const A* load_centres(const ClusterDispatch<A>& d, int64_t b, A* buffer) {
  return load_tile(d.centre_rows, b, 0, d.centres, d.channels, buffer);
}

// out_n = similarity_n centre[label_n]
template <class A>
void forward(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  Scratch<A> buffer(d.centres * channels);
  Scratch<A> tile(kTile * channels);
  const A* rows = nullptr;
  int64_t loaded_sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / d.chunks;
    if (b != loaded_sample) rows = load_centres<A>(d, b, buffer);
    loaded_sample = b;
    const Span span = chunk_span(d.tokens, d.chunks, task % d.chunks);
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

// similarity_grad_n = grad_n . centre[label_n], chunk_sums_o = sum of similarity_n grad_n over the cluster.
template <class A>
void grad_sums(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  const int64_t size = d.centres * channels;
  Scratch<A> buffer(size);
  Scratch<A> tile(kTile * channels);
  const A* rows = nullptr;
  int64_t loaded_sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / d.chunks;
    const int64_t chunk = task % d.chunks;
    if (b != loaded_sample) rows = load_centres<A>(d, b, buffer);
    loaded_sample = b;
    A* sums = d.chunk_sums[b] + chunk * size;
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

// centre_grad = sum of the chunks' sums, in a fixed order.
template <class A>
void centre_grad(const ClusterDispatch<A>& d, int64_t begin, int64_t end) {
  const int64_t channels = d.channels;
  Scratch<A> block(kCentreBlock * channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / d.blocks();
    const int64_t first = task % d.blocks() * kCentreBlock;
    const int64_t m = d.centres - first < kCentreBlock ? d.centres - first : kCentreBlock;
    fill<A>(block, m * channels, A(0));
    for (int64_t k = 0; k < d.chunks; ++k)
      add_scaled<A>(A(1), d.chunk_sums[b] + (k * d.centres + first) * channels, m * channels, block);
    store_tile<A>(block, d.centre_grad, b, first, m, channels);
  }
}

template <class A>
ClusterDispatchOps<A> table() {
  return {forward<A>, grad_sums<A>, centre_grad<A>};
}

}  // namespace

const ClusterDispatchKernels& cluster_dispatch_kernels() {
  static const ClusterDispatchKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
