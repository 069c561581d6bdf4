// A plain forward pass of the ICM in double, and random inputs for it.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cluster/cuda/args.h"

namespace {

using namespace frd;

using Numbers = std::vector<double>;

std::mt19937 generator(1);
Numbers normal(size_t count) {
  std::normal_distribution<double> distribution;
  Numbers result(count);
  for (double& v : result) v = distribution(generator);
  return result;
}
template <class T>
std::vector<T> rounded(Numbers& numbers) {
  std::vector<T> result(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    store(result[i], static_cast<compute_t<T>>(numbers[i]));
    numbers[i] = load(result[i]);
  }
  return result;
}

struct Projection {
  Numbers key_weight, key_bias, value_weight, value_bias;
};

// One item of a batch: all that the loss depends on.
struct Inputs {
  int channels, columns;
  bool dense;
  std::vector<RoundArgs> rounds;
  std::vector<Projection> projections;  // of the rounds that have one
  Numbers x, alpha, beta;
};

// rows * weight^T + bias
Numbers linear(const Numbers& rows, const Numbers& weight, const Numbers& bias, int channels) {
  Numbers out(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t row = i / channels * channels, c = i % channels;
    out[i] = bias[c];
    for (int d = 0; d < channels; ++d) out[i] += rows[row + d] * weight[c * channels + d];
  }
  return out;
}

// Means over the bins of the round's grid; share: 1 / tokens of each.
Numbers pooled(const RoundArgs& r, const Numbers& tokens, int channels, Numbers& share) {
  Numbers means(size_t(r.centres()) * channels);
  share.assign(r.centres(), 0);
  for (int o = 0; o < r.centres(); ++o) {
    const int row = o / r.columns, column = o % r.columns;
    int count = 0;
    for (int64_t y = bin_begin(row, r.height, r.rows); y < bin_end(row, r.height, r.rows); ++y)
      for (int64_t x = bin_begin(column, r.width, r.columns); x < bin_end(column, r.width, r.columns);
           ++x, ++count)
        for (int c = 0; c < channels; ++c)
          means[o * channels + c] += tokens[(y * r.width + x) * channels + c];
    for (int c = 0; c < channels; ++c) means[o * channels + c] /= count;
    share[o] = 1.0 / count;
  }
  return means;
}

Numbers inverse_norms(const Numbers& rows, int channels) {
  Numbers result(rows.size() / channels);
  for (size_t i = 0; i < rows.size(); ++i) result[i / channels] += rows[i] * rows[i];
  for (double& v : result) v = 1 / std::sqrt(v);
  return result;
}

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

// What a forward pass keeps; labels: made where empty, else given.
struct Kept {
  std::vector<std::vector<int>> labels;
  Numbers saved;  // as the kernels lay it out
  Numbers out;    // [N, C]
};

struct RoundKept {
  Numbers cosines, cosine;  // [N, O], [N]
  Numbers unit, result;
};

RoundKept forward_round(const Inputs& in, int t, const Numbers& tokens, Kept& kept) {
  const RoundArgs& r = in.rounds[t];
  const int channels = in.channels, centres = r.centres();
  const bool projected = !in.projections[t].key_weight.empty();
  const Projection& p = in.projections[t];
  RoundKept k;
  Numbers share;
  const Numbers means = pooled(r, tokens, channels, share);
  const Numbers keys = projected ? linear(tokens, p.key_weight, p.key_bias, channels) : tokens;
  k.unit = projected ? linear(means, p.key_weight, p.key_bias, channels) : means;
  const Numbers scale = inverse_norms(keys, channels), unit_scale = inverse_norms(k.unit, channels);
  for (size_t i = 0; i < k.unit.size(); ++i) k.unit[i] *= unit_scale[i / channels];
  Numbers mean = means, mass(centres, 1);
  const bool choose = static_cast<int>(kept.labels.size()) <= t;
  if (choose) kept.labels.emplace_back(r.tokens());
  const double sign = in.dense || in.alpha[t] > 0 ? 1 : -1;
  for (int n = 0; n < r.tokens(); ++n) {
    int best = choose ? 0 : kept.labels[t][n];
    for (int o = 0; o < centres; ++o) {
      double dot = 0;
      for (int c = 0; c < channels; ++c) dot += keys[n * channels + c] * k.unit[o * channels + c];
      k.cosines.push_back(dot * scale[n]);
      if (choose && sign * k.cosines.back() > sign * k.cosines[size_t(n) * centres + best]) best = o;
    }
    kept.labels[t][n] = best;
    k.cosine.push_back(k.cosines[size_t(n) * centres + best]);
    const double weight = in.dense ? 1 : sigmoid(in.beta[t] + in.alpha[t] * k.cosine[n]);
    mass[best] += weight;
    for (int c = 0; c < channels; ++c) mean[best * channels + c] += weight * tokens[n * channels + c];
  }
  for (size_t i = 0; i < mean.size(); ++i) mean[i] /= mass[i / channels];
  k.result = projected ? linear(mean, p.value_weight, p.value_bias, channels) : mean;
  for (const Numbers* part : std::vector<const Numbers*>{&k.cosine, &scale, &means, &k.unit, &mean, &k.result,
                                                         &unit_scale, &mass, &share})
    kept.saved.insert(kept.saved.end(), part->begin(), part->end());
  if (in.dense) kept.saved.resize(in.rounds[t].saved.end);
  return k;
}

// Fills the queries and the products that the dense dispatch keeps, and makes the output of either.
void dispatch(const Inputs& in, const std::vector<RoundKept>& rounds, Kept& kept) {
  const int channels = in.channels, columns = in.columns, tokens = in.rounds[0].tokens();
  kept.out.assign(size_t(tokens) * channels, 0);
  const Numbers& last = rounds.back().result;
  if (!in.dense) {
    for (int n = 0; n < tokens; ++n) {
      double weight = 1;
      int at = n;
      for (size_t t = 0; t < rounds.size(); ++t) {
        weight *= sigmoid(in.beta[t] + in.alpha[t] * rounds[t].cosine[at]);
        at = kept.labels[t][at];
      }
      for (int c = 0; c < channels; ++c) kept.out[n * channels + c] = weight * last[at * channels + c];
    }
    return;
  }
  Numbers product;  // of the rounds from t on [N_t, J]
  for (int t = static_cast<int>(rounds.size()) - 1; t >= 0; --t) {
    const RoundArgs& r = in.rounds[t];
    const int centres = r.centres();
    Numbers later = product;
    if (later.empty()) {
      later.assign(size_t(centres) * columns, 0);
      for (int j = 0; j < columns; ++j) later[j * columns + j] = 1;
    }
    double* saved = kept.saved.data();
    for (int j = 0; j < columns; ++j)
      for (int c = 0; c < channels; ++c)
        for (int o = 0; o < centres; ++o)
          saved[r.saved.query + j * channels + c] +=
              later[o * columns + j] * rounds[t].unit[o * channels + c];
    const Projection& p = in.projections[t];
    for (int j = 0; j < columns; ++j)
      for (int c = 0; c < channels; ++c) {
        const double q = saved[r.saved.query + j * channels + c];
        if (p.key_weight.empty()) {
          saved[r.saved.projected + j * channels + c] = q;
          continue;
        }
        saved[r.saved.offset + j] += q * p.key_bias[c];
        for (int d = 0; d < channels; ++d)
          saved[r.saved.projected + j * channels + d] += q * p.key_weight[c * channels + d];
      }
    product.assign(size_t(r.tokens()) * columns, 0);
    for (int n = 0; n < r.tokens(); ++n)
      for (int j = 0; j < columns; ++j)
        for (int o = 0; o < centres; ++o)
          product[n * columns + j] += rounds[t].cosines[size_t(n) * centres + o] * later[o * columns + j];
    if (t > 0) std::copy(product.begin(), product.end(), saved + r.saved.product);
  }
  for (int n = 0; n < tokens; ++n)
    for (int j = 0; j < columns; ++j)
      for (int c = 0; c < channels; ++c)
        kept.out[n * channels + c] +=
            sigmoid(in.alpha[0] * product[n * columns + j] + in.beta[0]) * last[j * channels + c];
}

Kept forward(const Inputs& in, const std::vector<std::vector<int>>& labels = {}) {
  Kept kept{labels, {}, {}};
  std::vector<RoundKept> rounds;
  for (size_t t = 0; t < in.rounds.size(); ++t)
    rounds.push_back(forward_round(in, static_cast<int>(t), t == 0 ? in.x : rounds.back().result, kept));
  dispatch(in, rounds, kept);
  return kept;
}

}  // namespace
