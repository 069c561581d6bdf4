// Stages of the forward pass of a round, see RoundOps.
#include "cluster/cpu/kernels.h"

#include "cluster/cpu/tiles.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Number of tokens of sample b within the mask in the pixels [top, bottom) x [left, right).
template <class A>
int64_t bin_tokens(const ClusterRound<A>& r, int64_t b, int64_t top, int64_t bottom, int64_t left,
                   int64_t right) {
  if (!r.has_mask) return (bottom - top) * (right - left);
  int64_t count = 0;
  for (int64_t y = top; y < bottom; ++y)
    for (int64_t x = left; x < right; ++x) count += r.in_mask(b, y * r.width + x);
  return count;
}

// Bin means of one row of the grid: out [grid_width, C], inv_bin_count [grid_width].
template <class A>
void pool_bin_row(const ClusterRound<A>& r, const TokenView& view, int64_t b, int64_t row, A* buffer, A* out,
                  A* inv_bin_count) {
  const int64_t top = bin_begin(row, r.height, r.grid_height);
  const int64_t bottom = bin_end(row, r.height, r.grid_height);
  fill(out, r.grid_width * r.channels, A(0));
  for (int64_t first = top * r.width; first < bottom * r.width; first += kTile) {
    const int64_t left = bottom * r.width - first;
    const int64_t m = left < kTile ? left : kTile;
    const A* tokens = load_tile(view, b, first, m, r.channels, buffer);
    for (int64_t i = 0; i < m; ++i) {
      if (!r.in_mask(b, first + i)) continue;
      const int64_t column = (first + i) % r.width;
      for (int64_t j = first_bin(column, r.width, r.grid_width); j <= last_bin(column, r.width, r.grid_width);
           ++j)
        add_scaled(A(1), tokens + i * r.channels, r.channels, out + j * r.channels);
    }
  }
  for (int64_t j = 0; j < r.grid_width; ++j) {
    const int64_t left = bin_begin(j, r.width, r.grid_width);
    const int64_t right = bin_end(j, r.width, r.grid_width);
    const int64_t count = bin_tokens(r, b, top, bottom, left, right);
    inv_bin_count[j] = count > 0 ? A(1) / static_cast<A>(count) : A(0);
    if (count == 0) continue;
    for (int64_t c = 0; c < r.channels; ++c) out[j * r.channels + c] /= static_cast<A>(count);
  }
}

// pooled_o = mean of the tokens of bin o.
template <class A>
void pool(const ClusterRound<A>& r, int64_t begin, int64_t end) {
  Scratch<A> buffer(kTile * r.channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.grid_height;
    const int64_t bin = task % r.grid_height * r.grid_width;
    const auto mean = [&](const TokenView& view, const PerSample<A>& out) {
      pool_bin_row<A>(r, view, b, task % r.grid_height, buffer, out[b] + bin * r.channels,
                      r.inv_bin_count[b] + bin);
    };
    mean(r.values, r.pooled);
    if (!r.shared) mean(r.keys, r.pooled_keys);
  }
}

template <class A>
int64_t key_panels(int64_t centres) {
  return (centres + gemm_of(A()).panel - 1) / gemm_of(A()).panel;
}

// unit_key_o = key_o / max(|key_o|, kNormFloor) with key = pooled Wk^T + bk.
template <class A>
void centre_keys(const ClusterRound<A>& r, int64_t begin, int64_t end) {
  const GemmOps<A>& gemm = gemm_of(A());
  const int64_t panels = key_panels<A>(r.centres());
  const int64_t channels = r.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / panels;
    const int64_t first = task % panels * gemm.panel;
    const int64_t left = r.centres() - first;
    const int64_t m = left < gemm.panel ? left : gemm.panel;
    const A* pooled = r.pooled_keys[b] + first * channels;
    A* unit_key = r.unit_key[b] + first * channels;
    if (r.key_packed != nullptr) project(pooled, r.key_packed, r.key_bias, m, channels, unit_key);
    for (int64_t i = 0; i < m; ++i) {
      const A* key = (r.key_packed != nullptr ? unit_key : pooled) + i * channels;
      const A inv_norm = inverse_norm(key, channels);
      r.pooled_inv_norm[b][first + i] = inv_norm;
      for (int64_t c = 0; c < channels; ++c) unit_key[i * channels + c] = key[c] * inv_norm;
    }
    gemm.pack(unit_key, 1, channels, channels, m, r.unit_key_packed[b] + first * channels);
  }
}

// argmax_i sign * scores[i] by the rule of wins() in common.h, in two passes that vectorise. scores [n]; sign
// is 1, 0, -1 or NaN.
template <class A>
int32_t best_score(const A* scores, int32_t n, A sign) {
  A best = -__builtin_inf();
  int32_t nan = 0;
  int32_t index = n;
#pragma omp simd reduction(max : best) reduction(| : nan)
  for (int32_t i = 0; i < n; ++i) {
    const A v = sign * scores[i];
    best = v > best ? v : best;
    nan |= v != v;
  }
  if (!nan) {
#pragma omp simd reduction(min : index)
    for (int32_t i = 0; i < n; ++i) {
      const int32_t found = sign * scores[i] == best ? i : n;
      index = found < index ? found : index;
    }
    if (index < n) return index;
  }
  index = 0;
  for (int32_t i = 1; i < n; ++i)
    if (wins(sign * scores[i], sign * scores[index])) index = i;
  return index;
}

// label_n = argmax_o cos(key_n, unit_key_o), and the chunk's sums of weight_n and of weight_n value_n per
// centre. scores: [kTile, O]
template <class A>
void assign_chunk(const ClusterRound<A>& r, int64_t b, int64_t chunk, A* buffer, A* keys_buffer, A* scores,
                  A* unit_key) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  // The argmax ignores positive factors, so the token's norm, and monotonic functions, so the sigmoid. A
  // negative alpha selects the least similar centre, and alpha = 0 ties all.
  const A sign = r.order > 0 ? A(1) : r.order < 0 ? A(-1) : r.order;
  A* sums = r.chunk_sums[b] + chunk * centres * channels;
  A* weights = r.chunk_weights[b] + chunk * centres;
  fill(sums, centres * channels, A(0));
  fill(weights, centres, A(0));
  const Span span = chunk_span(r.tokens(), r.chunks, chunk);
  for (int64_t first = span.begin; first < span.end; first += kTile) {
    const int64_t m = span.end - first < kTile ? span.end - first : kTile;
    const A* tokens = load_tile(r.values, b, first, m, channels, buffer);
    const A* keys = load_keys(r, tokens, b, first, m, keys_buffer);
    gemm_of(A()).run(keys, channels, r.unit_key_packed[b], scores, centres, m, centres, channels, false);
    for (int64_t i = 0; i < m; ++i) {
      if (!r.in_mask(b, first + i)) {
        r.cosine[b][first + i] = r.inv_norm[b][first + i] = 0;
        continue;
      }
      const A* key = keys + i * channels;
      A* row = scores + i * centres;
      const A inv_norm = inverse_norm(key, channels);
      A factor = inv_norm;
      if (!is_live(inv_norm) || !(inv_norm > 0)) {
        // The norm counts as zero or has overflowed. The scores of such a key may have underflowed, or may
        // differ where its cosines are all zero, so they are computed again from the normalised key.
        for (int64_t c = 0; c < channels; ++c) unit_key[c] = key[c] * inv_norm;
        gemm_of(A()).run(unit_key, channels, r.unit_key_packed[b], row, centres, 1, centres, channels, false);
        factor = 1;
      }
      const int32_t label = best_score(row, static_cast<int32_t>(centres), sign);
      const A cosine = row[label] * factor;
      const A weight = token_weight(r, cosine);
      r.labels[b][first + i] = label;
      r.cosine[b][first + i] = cosine;
      r.inv_norm[b][first + i] = inv_norm;
      weights[label] += weight;
      add_scaled(weight, tokens + i * channels, channels, sums + label * channels);
    }
  }
}

template <class A>
void assign(const ClusterRound<A>& r, int64_t begin, int64_t end) {
  Scratch<A> buffer(kTile * r.channels);
  Scratch<A> keys(kTile * r.channels);
  Scratch<A> scores(kTile * r.centres());
  Scratch<A> unit_key(r.channels);
  for (int64_t task = begin; task < end; ++task)
    assign_chunk<A>(r, task / r.chunks, task % r.chunks, buffer, keys, scores, unit_key);
}

// mean_o = (pooled_o + sum of weight_n value_n) / (1 + sum of weight_n), result = mean Wv^T + bv.
template <class A>
void update_centres(const ClusterRound<A>& r, int64_t begin, int64_t end) {
  const int64_t channels = r.channels;
  const int64_t centres = r.centres();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / r.blocks();
    const int64_t first = task % r.blocks() * kCentreBlock;
    const int64_t m = centres - first < kCentreBlock ? centres - first : kCentreBlock;
    A* mean = r.mean[b] + first * channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* pooled = r.pooled[b] + (first + i) * channels;
      A* row = mean + i * channels;
      A weight_sum = 1;
      for (int64_t c = 0; c < channels; ++c) row[c] = pooled[c];
      for (int64_t k = 0; k < r.chunks; ++k) {
        weight_sum += r.chunk_weights[b][k * centres + first + i];
        add_scaled(A(1), r.chunk_sums[b] + (k * centres + first + i) * channels, channels, row);
      }
      for (int64_t c = 0; c < channels; ++c) row[c] /= weight_sum;
      r.weight_sum[b][first + i] = weight_sum;
    }
    A* result = r.result[b] + first * channels;
    if (r.value_packed != nullptr)
      project(mean, r.value_packed, r.value_bias, m, channels, result);
    else if (result != mean)
      for (int64_t c = 0; c < m * channels; ++c) result[c] = mean[c];
  }
}

// similarity_n = cos_n or sigmoid(beta + alpha cos_n), counts and centres in the dtype of the values.
template <class A>
void write_results(const ClusterRound<A>& r, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t o = 0; o < r.centres(); ++o) r.counts[b][o] = 0;
    for (int64_t n = 0; n < r.tokens(); ++n) {
      r.similarity[b][n] = 0;
      if (!r.in_mask(b, n)) continue;
      ++r.counts[b][r.labels[b][n]];
      r.similarity[b][n] = r.weighted ? token_weight(r, r.cosine[b][n]) : r.cosine[b][n];
    }
    store_tile(static_cast<const A*>(r.result[b]), r.result_view, b, 0, r.centres(), r.channels);
  }
}

template <class A>
RoundOps<A> table() {
  return {key_panels<A>, gemm_of(A()).packed_size, gemm_of(A()).pack, pool<A>, centre_keys<A>,
          assign<A>,     update_centres<A>,        write_results<A>};
}

}  // namespace

const RoundKernels& round_kernels() {
  static const RoundKernels kernels{table<float>(), table<double>()};
  return kernels;
}

}  // namespace FRD_ISA
}  // namespace frd
