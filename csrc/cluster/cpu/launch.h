// What the CPU operators of the clustering share: views, allocation, stages over torch's thread pool.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cluster/cpu/kernels.h"
#include "cluster/op.h"
#include "cluster/saved.h"

namespace frd {

inline const RoundOps<float>& round_ops(float) { return round_kernels().f32; }
inline const RoundOps<double>& round_ops(double) { return round_kernels().f64; }
inline const RoundGradOps<float>& round_grad_ops(float) { return round_grad_kernels().f32; }
inline const RoundGradOps<double>& round_grad_ops(double) { return round_grad_kernels().f64; }
inline const DispatchOps<float>& dispatch_ops(float) { return dispatch_kernels().f32; }
inline const DispatchOps<double>& dispatch_ops(double) { return dispatch_kernels().f64; }

template <class F>
void for_units(int64_t units, const F& run) {
  if (units > 0) torch::stable::parallel_for(0, units, 1, run);
}

// Gives out parts of one block of memory for each item of the batch; with a null base it only counts.
template <class A>
class Arena {
 public:
  Arena(A* base, int64_t stride) : base_(base), stride_(stride) {}
  PerItem<A> take(int64_t size) {
    PerItem<A> part{base_ == nullptr ? nullptr : base_ + used_, stride_};
    used_ += size;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  A* base_;
  int64_t stride_;
  int64_t used_ = 0;
};

template <class A, class Layout>
int64_t measure(const Layout& layout) {
  Arena<A> counter(nullptr, 0);
  layout(counter);
  return counter.used();
}

// memory [B, size of the layout], contiguous
template <class A, class Layout>
void place(const Tensor& memory, const Layout& layout) {
  Arena<A> arena(static_cast<A*>(memory.mutable_data_ptr()), memory.size(1));
  layout(arena);
}

// Uninitialised memory for the layout, for each item of the batch.
template <class A, class Layout>
Tensor allocate(const Tensor& like, int64_t batch, const Layout& layout) {
  Tensor memory = torch::stable::new_empty(like, Sizes{batch, measure<A>(layout)}, kScalarType<A>);
  place<A>(memory, layout);
  return memory;
}

// Pieces of a pass over the tokens of an item: of at least 128 tokens, and their partial centres no more than
// the tokens. It must not depend on the batch or the number of threads, which would change the order of the
// sums.
inline int64_t chunk_count(int64_t tokens, int64_t centres) {
  return std::max<int64_t>(1, std::min<int64_t>({16, (tokens + 127) / 128, tokens / centres}));
}

// Pieces of the sum over the whole batch that gives the key projection's gradient.
inline int64_t group_count(int64_t batch, int64_t chunks) { return std::min<int64_t>(8, batch * chunks); }

// Points the round at what it keeps for its backward pass. saved [B, L]
template <class A>
void bind_saved(Round<A>& r, const SavedRound& at, const Tensor& saved) {
  const auto part = [&](int64_t offset) {
    return PerItem<A>{static_cast<A*>(const_cast<void*>(saved.const_data_ptr())) + offset, saved.size(1)};
  };
  r.cosine = part(at.cosine);
  r.scale = part(at.scale);
  r.pooled = part(at.pooled);
  r.unit = part(at.unit);
  r.mean = part(at.mean);
  r.result = part(at.result);
  r.unit_scale = part(at.unit_scale);
  r.mass = part(at.mass);
  r.share = part(at.share);
}

// What a round needs during the call.
template <class A>
void layout_workspace(Round<A>& r, Arena<A>& arena) {
  const int64_t size = r.centres() * r.channels;
  r.pooled_keys = r.shared ? r.pooled : arena.take(size);
  r.unit_packed = arena.take(round_ops(A()).packed_size(r.channels, r.centres()));
  r.sums = arena.take(r.chunks * size);
  r.weights = arena.take(r.chunks * r.centres());
}

template <class A>
void layout_workspace(const Round<A>& r, RoundGrad<A>& g, Arena<A>& arena) {
  const int64_t size = r.centres() * r.channels;
  g.result_grad = arena.take(size);
  g.mean_grad = arena.take(size);
  g.mean_dot = arena.take(r.centres());
  g.centre_grad = arena.take(size);
  g.pooled_grad = arena.take(size);
  if (g.dense) {
    g.unit_grad = arena.take(size);
    return;
  }
  g.similarity_grad = arena.take(r.tokens());
  g.pull = arena.take(r.tokens());
  g.sums = arena.take(r.chunks * size);
  g.pulls = arena.take(r.chunks * r.centres());
  g.gate_grad = arena.take(r.chunks * 2);
}

template <class A>
void run_round(const Round<A>& r) {
  const RoundOps<A>& ops = round_ops(A());
  const auto stage = [&](typename RoundOps<A>::Stage run, int64_t units) {
    for_units(units, [&](int64_t begin, int64_t end) { run(r, begin, end); });
  };
  stage(ops.pool, r.batch * r.rows);
  stage(ops.centre_keys, r.batch * ops.key_panels(r.centres()));
  stage(ops.assign, r.batch * r.chunks);
  stage(ops.finish, r.batch * r.blocks());
}

// Gradients of a round whose result_grad, and similarity_grad or (dense) unit_grad, stand.
template <class A>
void run_round_grad(const Round<A>& r, const RoundGrad<A>& g) {
  const RoundGradOps<A>& ops = round_grad_ops(A());
  const auto stage = [&](typename RoundGradOps<A>::Stage run, int64_t units) {
    for_units(units, [&](int64_t begin, int64_t end) { run(r, g, begin, end); });
  };
  stage(ops.mean_grad, r.batch * r.blocks());
  if (!g.dense) stage(ops.pulls, r.batch * r.chunks);
  stage(ops.centre_grad, r.batch * r.blocks());
  stage(ops.token_grad, g.groups);
  if (g.key_rows == nullptr) return;
  stage(ops.pack_means, r.batch);
  stage(ops.weight_grad, 2 * ((r.channels + kCentreBlock - 1) / kCentreBlock));
}

// Sum of the chunks' parts of the gradients of alpha (which 0) or beta (1), in a fixed order.
template <class A>
A sum_gate_grad(const PerItem<A>& parts, int64_t batch, int64_t chunks, int which) {
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < chunks; ++k) sum += parts[b][k * 2 + which];
  return static_cast<A>(sum);
}

}  // namespace frd
