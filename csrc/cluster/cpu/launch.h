// Shared by the CPU operators of the clustering: memory, and running stages on torch's thread pool.
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
inline const IcmDispatchOps<float>& icm_dispatch_ops(float) { return icm_dispatch_kernels().f32; }
inline const IcmDispatchOps<double>& icm_dispatch_ops(double) { return icm_dispatch_kernels().f64; }

// Runs run(begin, end) over the tasks 0 .. tasks - 1, distributed over threads.
template <class F>
void for_tasks(int64_t tasks, const F& run) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, run);
}

// Hands out parts of one block of memory per sample; with a null base it only counts their size.
template <class A>
class Arena {
 public:
  Arena(A* base, int64_t stride) : base_(base), stride_(stride) {}
  PerSample<A> take(int64_t size) {
    PerSample<A> part{base_ == nullptr ? nullptr : base_ + used_, stride_};
    used_ += size;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  A* base_;
  int64_t stride_;
  int64_t used_ = 0;
};

// Elements per sample that a layout takes.
template <class A, class Layout>
int64_t measure(const Layout& layout) {
  Arena<A> counter(nullptr, 0);
  layout(counter);
  return counter.used();
}

// Binds a layout to memory [B, size of the layout], contiguous.
template <class A, class Layout>
void place(const Tensor& memory, const Layout& layout) {
  Arena<A> arena(static_cast<A*>(memory.mutable_data_ptr()), memory.size(1));
  layout(arena);
}

// Allocates uninitialised memory for a layout and binds it.
template <class A, class Layout>
Tensor allocate(const Tensor& like, int64_t batch, const Layout& layout) {
  Tensor memory = torch::stable::new_empty(like, Sizes{batch, measure<A>(layout)}, kScalarType<A>);
  place<A>(memory, layout);
  return memory;
}

// Chunks of a pass over the tokens of a sample: each of at least 128 tokens, and all their partial centres
// together no more than the tokens. Independent of the batch and of the number of threads, as it sets the
// order of sums.
inline int64_t chunk_count(int64_t tokens, int64_t centres) {
  return std::max<int64_t>(1, std::min<int64_t>({16, (tokens + 127) / 128, tokens / centres}));
}

// Groups of the sum over the whole batch that gives the key projection's gradient.
inline int64_t group_count(int64_t batch, int64_t chunks) { return std::min<int64_t>(8, batch * chunks); }

// Binds what the round saves for its backward pass to saved [B, L].
template <class A>
void bind_saved(ClusterRound<A>& r, const SavedRound& at, const Tensor& saved) {
  const auto part = [&](int64_t offset) {
    return PerSample<A>{static_cast<A*>(const_cast<void*>(saved.const_data_ptr())) + offset, saved.size(1)};
  };
  r.cosine = part(at.cosine);
  r.inv_norm = part(at.inv_norm);
  r.pooled = part(at.pooled);
  r.unit_key = part(at.unit);
  r.mean = part(at.mean);
  r.result = part(at.result);
  r.pooled_inv_norm = part(at.unit_inv_norm);
  r.weight_sum = part(at.weight_sum);
  r.inv_bin_count = part(at.inv_bin_count);
}

// Workspace of a round.
template <class A>
void layout_workspace(ClusterRound<A>& r, Arena<A>& arena) {
  const int64_t size = r.centres() * r.channels;
  r.pooled_keys = r.shared ? r.pooled : arena.take(size);
  r.unit_key_packed = arena.take(round_ops(A()).packed_size(r.channels, r.centres()));
  r.chunk_sums = arena.take(r.chunks * size);
  r.chunk_weights = arena.take(r.chunks * r.centres());
}

// Workspace of the gradients of a round.
template <class A>
void layout_workspace(const ClusterRound<A>& r, ClusterRoundGrad<A>& g, Arena<A>& arena) {
  const int64_t size = r.centres() * r.channels;
  g.result_grad = arena.take(size);
  g.mean_grad = arena.take(size);
  g.mean_dot = arena.take(r.centres());
  g.pooled_key_grad = arena.take(size);
  g.pooled_grad = arena.take(size);
  if (g.dense) {
    g.unit_key_grad = arena.take(size);
    return;
  }
  g.similarity_grad = arena.take(r.tokens());
  g.dcos = arena.take(r.tokens());
  g.dcos_key_sums = arena.take(r.chunks * size);
  g.dcos_sums = arena.take(r.chunks * r.centres());
  g.gate_grad = arena.take(r.chunks * 2);
}

// The forward pass of a round.
template <class A>
void run_round(const ClusterRound<A>& r) {
  const RoundOps<A>& ops = round_ops(A());
  const auto stage = [&](typename RoundOps<A>::Stage run, int64_t tasks) {
    for_tasks(tasks, [&](int64_t begin, int64_t end) { run(r, begin, end); });
  };
  stage(ops.pool, r.batch * r.grid_height);
  stage(ops.centre_keys, r.batch * ops.key_panels(r.centres()));
  stage(ops.assign, r.batch * r.chunks);
  stage(ops.update_centres, r.batch * r.blocks());
}

// The backward pass of a round. result_grad, and similarity_grad or if dense unit_key_grad, are given.
template <class A>
void run_round_grad(const ClusterRound<A>& r, const ClusterRoundGrad<A>& g) {
  const RoundGradOps<A>& ops = round_grad_ops(A());
  const auto stage = [&](typename RoundGradOps<A>::Stage run, int64_t tasks) {
    for_tasks(tasks, [&](int64_t begin, int64_t end) { run(r, g, begin, end); });
  };
  stage(ops.mean_grad, r.batch * r.blocks());
  if (!g.dense) stage(ops.dcos, r.batch * r.chunks);
  stage(ops.pooled_key_grad, r.batch * r.blocks());
  stage(ops.token_grad, g.groups);
  if (g.key_packed == nullptr) return;
  stage(ops.pack_means, r.batch);
  stage(ops.weight_grad, 2 * ((r.channels + kCentreBlock - 1) / kCentreBlock));
}

// The gradient of alpha (which 0) or beta (1) from parts [B, chunks, 2], summed in a fixed order.
template <class A>
A sum_gate_grad(const PerSample<A>& parts, int64_t batch, int64_t chunks, int which) {
  double sum = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < chunks; ++k) sum += parts[b][k * 2 + which];
  return static_cast<A>(sum);
}

}  // namespace frd
