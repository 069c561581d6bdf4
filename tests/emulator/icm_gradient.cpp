// The gradients of the clustering under the emulator, against finite differences of a plain forward pass.
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "cluster/cuda/grad_plan.h"
#include "cluster/cuda/icm_grad_launch.cuh"
#include "icm_plain.h"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace {

Inputs make_inputs(bool dense, bool projected, int height, int width, const std::vector<int>& grids,
                   int channels) {
  Inputs in{};
  in.channels = channels, in.dense = dense;
  const int count = static_cast<int>(grids.size()) / 2;
  in.columns = grids[2 * count - 2] * grids[2 * count - 1];
  int64_t labels = 0, saved = 0;
  for (int t = 0; t < count; ++t) {
    RoundArgs r{};
    r.height = t == 0 ? height : grids[2 * t - 2], r.width = t == 0 ? width : grids[2 * t - 1];
    r.rows = grids[2 * t], r.columns = grids[2 * t + 1];
    r.labels = labels;
    r.saved = saved_round(saved, r.tokens(), r.centres(), channels, dense ? in.columns : 0, t == 0);
    labels += r.tokens(), saved = r.saved.end;
    in.rounds.push_back(r);
    Projection p;
    if (projected && t != 1)
      p = {normal(channels * channels), normal(channels), normal(channels * channels), normal(channels)};
    for (double& w : p.key_weight) w /= std::sqrt(channels);
    in.projections.push_back(p);
  }
  in.x = normal(size_t(height) * width * channels);
  in.alpha = {0.75, 1.25, -0.5}, in.beta = {-0.25, 0.125, 0.5};
  return in;
}

// The memory of a call for a batch of items that differ in x, and its gradients.
template <class T>
class Call {
  using A = compute_t<T>;

 public:
  // x, weights: rounded to T in place
  Call(std::vector<Inputs>& items, const std::vector<Numbers>& grads, bool channel_major, int team,
       int shared_bytes) {
    Inputs& in = items[0];
    a_.dtype = sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
    a_.batch = items.size(), a_.channels = in.channels, a_.count = static_cast<int>(in.rounds.size());
    a_.columns = in.columns, a_.dense = in.dense, a_.weighted = !in.dense;
    a_.shared = a_.dispatch = true, a_.gates = in.dense ? 1 : a_.count;
    for (int t = 0; t < a_.count; ++t) {
      RoundArgs& r = a_.round[t] = in.rounds[t];
      a_.label_stride += r.tokens(), a_.saved_stride = r.saved.end;
      Projection& p = in.projections[t];
      if (p.key_weight.empty()) continue;
      a_.projected = true;
      r.key_weight = keep(p.key_weight), r.key_bias = keep(p.key_bias);
      r.value_weight = keep(p.value_weight), r.value_bias = keep(p.value_bias);
      const int c = in.channels;
      a_.projection_grad[t] = {room(c * c), room(c), room(c * c), room(c)};
    }
    const int64_t n = in.rounds[0].tokens(), c = in.channels;
    Numbers x, grad;
    for (size_t b = 0; b < items.size(); ++b) {
      rounded<T>(items[b].x);
      for (int64_t i = 0; i < n * c; ++i) {
        const int64_t at = channel_major ? i % n * c + i / n : i;
        x.push_back(items[b].x[at]), grad.push_back(grads[b][at]);
      }
      items[b].projections = in.projections;
    }
    a_.keys = a_.values = view(keep(x), n, c, channel_major);
    a_.grad = view(keep(grad), n, c, channel_major);
    a_.keys_grad = view(room(x.size()), n, c, channel_major);
    plan_grads(a_, team, shared_bytes);
    for (int t = 0; t < 3; ++t) {
      gates_.push_back(static_cast<A>(in.alpha[t])), gate_offsets_.push_back(static_cast<A>(in.beta[t]));
    }
    a_.alpha = gates_.data(), a_.beta = gate_offsets_.data();
  }

  int run(const std::vector<Kept>& kept) {
    std::vector<A> saved;
    std::vector<int32_t> labels;
    for (const Kept& k : kept) {
      for (double v : k.saved) saved.push_back(static_cast<A>(v));
      for (const auto& of_round : k.labels) labels.insert(labels.end(), of_round.begin(), of_round.end());
    }
    std::vector<A> workspace(a_.batch * a_.workspace_stride, NAN),
        rows(a_.batch * a_.team * a_.block_rows, NAN);
    std::vector<A> parts(size_t(a_.first_part[2 * a_.count]) * (a_.channels + 1) * a_.channels, NAN);
    std::vector<double> gate_parts(a_.batch * a_.gates * kGradBlocks * 2, NAN);
    alpha_grad.assign(a_.gates, NAN), beta_grad.assign(a_.gates, NAN);
    a_.saved = saved.data(), a_.labels = labels.data(), a_.workspace = workspace.data();
    a_.block_memory = a_.block_rows > 0 ? rows.data() : nullptr;
    a_.weight_parts = parts.data(), a_.gate_parts = gate_parts.data();
    a_.alpha_grad = alpha_grad.data(), a_.beta_grad = beta_grad.data();
    return launch_grads<T>(a_, nullptr) != cudaSuccess;
  }

  double x_grad(int b, int n, int c) const {
    const TokenView& v = a_.keys_grad;
    return load(static_cast<const T*>(v.data)[b * v.batch + n * v.token + c * v.channel]);
  }
  // which: 0 Wk, 1 bk, 2 Wv, 3 bv
  double projection_grad(int t, int which, int i) const {
    const RoundGradOut& g = a_.projection_grad[t];
    const void* from[] = {g.key_weight, g.key_bias, g.value_weight, g.value_bias};
    return load(static_cast<const T*>(from[which])[i]);
  }
  std::vector<A> alpha_grad, beta_grad;

 private:
  T* room(size_t count) {
    T nan;
    store(nan, A(NAN));
    alive_.emplace_back(count, nan);
    return alive_.back().data();
  }
  T* keep(Numbers& numbers) {
    alive_.push_back(rounded<T>(numbers));
    return alive_.back().data();
  }
  static TokenView view(T* data, int64_t n, int64_t c, bool channel_major) {
    const DType dtype = sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
    return {data, dtype, n * c, channel_major ? 1 : c, channel_major ? n : 1};
  }

  IcmGradArgs a_{};
  std::vector<std::vector<T>> alive_;
  std::vector<A> gates_, gate_offsets_;
};

// d loss / d v of the item, v being a number inside it; the labels stay.
double slope(Inputs& in, const Kept& kept, const Numbers& grad, double& v) {
  constexpr double kStep = 1e-5;
  const double before = v;
  double loss[2];
  for (int side = 0; side < 2; ++side) {
    v = before + (side ? kStep : -kStep);
    const Kept moved = forward(in, kept.labels);
    loss[side] = 0;
    for (size_t i = 0; i < grad.size(); ++i) loss[side] += grad[i] * moved.out[i];
  }
  v = before;
  return (loss[1] - loss[0]) / (2 * kStep);
}

struct Compare {
  double tolerance;
  Numbers found, wanted;
  void add(double a, double b) { found.push_back(a), wanted.push_back(b); }
  // Of the largest element of each gradient.
  int wrong() {
    double largest = 1e-3;
    for (double v : wanted) largest = std::max(largest, std::fabs(v));
    int count = 0;
    for (size_t i = 0; i < found.size(); ++i)
      count += !(std::fabs(found[i] - wanted[i]) <= tolerance * largest);
    found.clear(), wanted.clear();
    return count;
  }
};

// Every few elements of all gradients.
template <class T>
int compare(Call<T>& call, std::vector<Inputs>& items, const std::vector<Kept>& kept,
            const std::vector<Numbers>& grads) {
  Compare all{sizeof(T) == 8 ? 1e-6 : sizeof(T) == 4 ? 1e-4 : 8e-3, {}, {}};
  int wrong = 0;
  const int channels = items[0].channels, tokens = items[0].rounds[0].tokens();
  for (size_t b = 0; b < items.size(); ++b)
    for (int i = b; i < tokens * channels; i += 3)
      all.add(call.x_grad(b, i / channels, i % channels), slope(items[b], kept[b], grads[b], items[b].x[i]));
  wrong += all.wrong();
  const auto over_batch = [&](const std::function<double&(Inputs&)>& number) {
    double sum = 0;
    for (size_t b = 0; b < items.size(); ++b) sum += slope(items[b], kept[b], grads[b], number(items[b]));
    return sum;
  };
  for (size_t t = 0; t < items[0].rounds.size(); ++t) {
    const size_t sizes[] = {
        items[0].projections[t].key_weight.size(), items[0].projections[t].key_bias.size(),
        items[0].projections[t].value_weight.size(), items[0].projections[t].value_bias.size()};
    for (int which = 0; which < 4; ++which) {
      for (size_t i = t; i < sizes[which]; i += which % 2 ? 1 : 5)
        all.add(call.projection_grad(t, which, i), over_batch([&](Inputs& in) -> double& {
                  Projection& p = in.projections[t];
                  Numbers* parts[] = {&p.key_weight, &p.key_bias, &p.value_weight, &p.value_bias};
                  return (*parts[which])[i];
                }));
      wrong += all.wrong();
    }
  }
  all.tolerance = std::max(all.tolerance, 1e-3);  // sums over all tokens that cancel
  for (size_t t = 0; t < call.alpha_grad.size(); ++t) {
    all.add(call.alpha_grad[t], over_batch([&](Inputs& in) -> double& { return in.alpha[t]; }));
    all.add(call.beta_grad[t], over_batch([&](Inputs& in) -> double& { return in.beta[t]; }));
  }
  return wrong + all.wrong();
}

template <class T>
int check(bool dense, bool projected, int height, int width, const std::vector<int>& grids, int channels,
          int team, int shared_bytes = 160 * 1024) {
  std::vector<Inputs> items{make_inputs(dense, projected, height, width, grids, channels)};
  items.push_back(items[0]);
  items[1].x = normal(items[0].x.size());
  std::vector<Numbers> grads{normal(items[0].x.size()), normal(items[0].x.size())};
  for (Numbers& grad : grads) rounded<T>(grad);
  Call<T> call(items, grads, team == 1, team, shared_bytes);
  std::vector<Kept> kept;
  for (const Inputs& in : items) kept.push_back(forward(in));
  int wrong = 0;
  for (int repeat = 0; repeat < 2; ++repeat) {  // with another order of the threads
    wrong += call.run(kept);
    if (repeat == 0) wrong += compare(call, items, kept, grads);
  }
  if (wrong)
    std::printf("%zu bytes, dense %d, projected %d, %d x %d, %d channels, team of %d: %d wrong\n", sizeof(T),
                dense, projected, height, width, channels, team, wrong);
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
  const std::vector<int> three{3, 3, 2, 2, 2, 1}, two{2, 3, 1, 2};
  for (const bool dense : {false, true})
    for (const int team : {8, 1}) {
      wrong += check<float>(dense, true, 5, 4, three, 7, team);
      wrong += check<float>(dense, false, 7, 9, two, 6, team);
      wrong += check<bf16>(dense, true, 5, 7, three, 16, team);
      wrong += check<double>(dense, true, 4, 4, two, 5, team, 44 * 1024);  // rows in global memory
    }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
