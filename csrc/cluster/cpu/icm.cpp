// The CPU operator `icm`: all rounds of clustering and the dispatch to the tokens.
#include <tuple>

#include "cluster/cpu/launch.h"
#include "core/layout.h"

namespace frd {
namespace {

// The arguments of all rounds, with gates and projections in the compute type.
template <class A>
struct Icm {
  const IcmInputs& in;
  std::vector<ClusterRound<A>> rounds;
  std::vector<SavedRound> saved_layouts;
  std::vector<PerSample<A>> query, projected, offset, product;
  DenseDispatch<A> dense{};
  // Tensors that the rounds point into.
  std::vector<Tensor> alive;

  explicit Icm(const IcmInputs& inputs)
      : in(inputs),
        rounds(in.count()),
        query(in.count()),
        projected(in.count()),
        offset(in.count()),
        product(in.count()) {
    const int64_t gates = in.variant == kPaper ? 1 : in.count();
    const Tensor alpha = check_gate(in.alpha, in.x, gates, "alpha");
    const Tensor beta = check_gate(in.beta, in.x, gates, "beta");
    for (int64_t t = 0; t < in.count(); ++t) {
      ClusterRound<A>& r = rounds[t];
      r.batch = in.x.size(0);
      r.channels = in.x.size(2);
      r.height = t == 0 ? in.hw[0] : in.grids[2 * t - 2];
      r.width = t == 0 ? in.hw[1] : in.grids[2 * t - 1];
      r.grid_height = in.grids[2 * t];
      r.grid_width = in.grids[2 * t + 1];
      r.chunks = chunk_count(r.tokens(), r.centres());
      r.shared = true;
      r.weighted = in.variant == kReleased;
      r.alpha = alpha.const_data_ptr<A>()[r.weighted ? t : 0];
      r.beta = beta.const_data_ptr<A>()[r.weighted ? t : 0];
      if (r.weighted) r.order = r.alpha;
      if (!in.projected(t)) continue;
      r.key_weight = rows_of(in.projections[4 * t]);
      r.key_bias = rows_of(in.projections[4 * t + 1]);
      r.value_bias = rows_of(in.projections[4 * t + 3]);
    }
    dense.alpha = rounds[0].alpha;
    dense.beta = rounds[0].beta;
    dense.last_centres = rounds.back().centres();
    const int64_t last_centres = in.variant == kPaper ? dense.last_centres : 0;
    for (const ClusterRound<A>& r : rounds)
      saved_layouts.push_back(saved_round(saved_layouts.empty() ? 0 : saved_size(), r.tokens(), r.centres(),
                                          r.channels, last_centres, saved_layouts.empty()));
  }

  // t, contiguous and in the compute type.
  const A* rows_of(const Tensor& t) {
    alive.push_back(in_layout(in_type(t, kScalarType<A>)));
    return alive.back().template const_data_ptr<A>();
  }

  // L: elements of `saved` per sample.
  int64_t saved_size() const { return saved_layouts.back().end; }

  // Labels of all rounds per sample.
  int64_t label_count() const {
    int64_t sum = 0;
    for (const ClusterRound<A>& r : rounds) sum += r.tokens();
    return sum;
  }

  // Binds the memory of the forward pass. saved [B, L], labels [B, label_count]
  void bind(const Tensor& saved, const Tensor& labels) {
    A* const base = static_cast<A*>(const_cast<void*>(saved.const_data_ptr()));
    int32_t* at = static_cast<int32_t*>(const_cast<void*>(labels.const_data_ptr()));
    for (size_t t = 0; t < rounds.size(); ++t) {
      ClusterRound<A>& r = rounds[t];
      bind_saved(r, saved_layouts[t], saved);
      query[t] = {base + saved_layouts[t].query, saved_size()};
      projected[t] = {base + saved_layouts[t].projected, saved_size()};
      offset[t] = {base + saved_layouts[t].offset, saved_size()};
      product[t] = {base + saved_layouts[t].product, saved_size()};
      r.labels = {at, label_count()};
      at += r.tokens();
      if (t == 0) {
        r.values = view_of(in.x);
      } else {
        const PerSample<A>& from = rounds[t - 1].result;
        r.values = {from.data, kScalarType<A> == ScalarType::Double ? DType::f64 : DType::f32, from.stride,
                    r.channels, 1};
      }
      r.keys = r.values;
    }
    dense.projected = projected[0];
    dense.offset = offset[0];
    dense.last = rounds.back().result;
  }

  IcmDispatch<A> dispatch() {
    IcmDispatch<A> d{};
    d.count = in.count();
    d.rounds = rounds.data();
    d.query = query.data();
    d.projected = projected.data();
    d.offset = offset.data();
    d.product = product.data();
    d.dense = dense;
    return d;
  }
};

// Packs [C, C] matrices for the GEMM: run() packs all that were added, in one parallel loop.
template <class A>
class Packer {
 public:
  explicit Packer(const Tensor& like, int64_t channels, int64_t capacity)
      : channels_(channels),
        size_(round_ops(A()).packed_size(channels, channels)),
        memory_(torch::stable::new_empty(like, Sizes{capacity * size_}, kScalarType<A>)) {}
  const A* add(const A* matrix, bool transposed) {
    A* out = memory_.mutable_data_ptr<A>() + static_cast<int64_t>(jobs_.size()) * size_;
    jobs_.push_back({matrix, transposed, out});
    return out;
  }
  void run() const {
    for_tasks(static_cast<int64_t>(jobs_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Job& job = jobs_[i];
        round_ops(A()).pack(job.matrix, job.transposed ? 1 : channels_, job.transposed ? channels_ : 1,
                            channels_, channels_, job.out);
      }
    });
  }

 private:
  struct Job {
    const A* matrix;
    bool transposed;
    A* out;
  };
  int64_t channels_, size_;
  Tensor memory_;
  std::vector<Job> jobs_;
};

// -> out [B, N, C], labels [B, labels of all rounds], saved [B, L]
template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const IcmInputs& in) {
  Icm<A> icm(in);
  const int64_t batch = in.x.size(0);
  const int64_t count = in.count();
  Tensor out = new_like_tokens(in.x);
  Tensor labels = torch::stable::new_empty(in.x, Sizes{batch, icm.label_count()}, ScalarType::Int);
  Tensor saved = torch::stable::new_empty(in.x, Sizes{batch, icm.saved_size()}, kScalarType<A>);
  icm.bind(saved, labels);
  Packer<A> packer(in.x, in.x.size(2), 2 * count);
  const Tensor workspace = allocate<A>(in.x, batch, [&](Arena<A>& arena) {
    for (ClusterRound<A>& r : icm.rounds) layout_workspace(r, arena);
  });
  for (int64_t t = 0; t < count; ++t) {
    ClusterRound<A>& r = icm.rounds[t];
    if (!in.projected(t)) continue;
    r.key_packed = packer.add(r.key_weight, true);
    r.value_packed = packer.add(icm.rows_of(in.projections[4 * t + 2]), true);
  }
  packer.run();
  for (const ClusterRound<A>& r : icm.rounds) run_round(r);

  IcmDispatch<A> d = icm.dispatch();
  d.out = view_of(out);
  const IcmDispatchOps<A>& ops = icm_dispatch_ops(A());
  const auto stage = [&](typename IcmDispatchOps<A>::Stage run, int64_t tasks) {
    for_tasks(tasks, [&](int64_t begin, int64_t end) { run(d, begin, end); });
  };
  if (in.variant == kPaper) stage(ops.queries, batch);
  stage(in.variant == kPaper ? ops.dense : ops.masked, batch * icm.rounds[0].chunks);
  return {out, labels, saved};
}

// Workspace of the dispatch's gradients.
template <class A>
void layout_workspace(const Icm<A>& icm, IcmDispatch<A>& d, Arena<A>& arena) {
  const ClusterRound<A>& r = icm.rounds[0];
  const int64_t last_centres = icm.dense.last_centres;
  if (icm.in.variant == kReleased) {
    d.grad_sums = arena.take(r.chunks * r.centres() * r.channels);
    return;
  }
  d.grad_sums = arena.take(r.chunks * last_centres * r.channels);
  d.query_sums = arena.take(r.chunks * last_centres * r.channels);
  d.query_dcos_sums = arena.take(r.chunks * last_centres);
  d.gate_grad = arena.take(r.chunks * 2);
}

struct Gradients {
  Tensor x;
  std::vector<Tensor> projections;
  Tensor alpha, beta;
};

// One backward pass; the constructor checks and allocates.
template <class A>
class Backward {
 public:
  Backward(const IcmInputs& in, const Tensor& grad, const Tensor& labels, const Tensor& saved)
      : in_(in),
        icm_(in),
        count_(in.count()),
        batch_(in.x.size(0)),
        gradients_(count_),
        packer_(in.x, in.x.size(2), 3 * count_) {
    check_saved(labels, saved);
    icm_.bind(saved, labels);
    icm_.dense.grad = view_of(grad);
    dispatch_ = icm_.dispatch();
    dispatch_.grad = view_of(grad);
    out_.x = new_like_tokens(in.x);
    allocate_workspaces();
    for (int64_t t = 0; t < count_; ++t) prepare(t);
    dispatch_.gradients = gradients_.data();
    packer_.run();
  }

  Gradients run() {
    const IcmDispatchOps<A>& ops = icm_dispatch_ops(A());
    const bool paper = in_.variant == kPaper;
    const auto stage = [&](typename IcmDispatchOps<A>::Stage run, int64_t tasks) {
      for_tasks(tasks, [&](int64_t begin, int64_t end) { run(dispatch_, begin, end); });
    };
    stage(paper ? ops.dense_grad_sums : ops.masked_grad_sums, batch_ * icm_.rounds[0].chunks);
    stage(paper ? ops.dense_centre_grad : ops.masked_centre_grad, batch_);
    for (int64_t t = count_ - 1; t >= 0; --t) run_round_grad(icm_.rounds[t], gradients_[t]);
    out_.alpha = torch::stable::new_empty(in_.alpha, Sizes{in_.alpha.size(0)});
    out_.beta = torch::stable::new_empty(in_.beta, Sizes{in_.beta.size(0)});
    for (int64_t t = 0; t < in_.alpha.size(0); ++t) {
      const PerSample<A>& parts = paper ? dispatch_.gate_grad : gradients_[t].gate_grad;
      const int64_t chunks = icm_.rounds[t].chunks;
      out_.alpha.template mutable_data_ptr<A>()[t] = sum_gate_grad(parts, batch_, chunks, 0);
      out_.beta.template mutable_data_ptr<A>()[t] = sum_gate_grad(parts, batch_, chunks, 1);
    }
    return out_;
  }

 private:
  void check_saved(const Tensor& labels, const Tensor& saved) {
    FRD_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == batch_ && labels.size(1) == icm_.label_count() &&
                        labels.scalar_type() == ScalarType::Int && labels.is_contiguous(),
                    "frd: labels must be what the forward pass returned");
    FRD_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == batch_ && saved.size(1) == icm_.saved_size() &&
                        saved.scalar_type() == kScalarType<A> && saved.is_contiguous(),
                    "frd: saved must be what the forward pass returned");
  }

  void keep(const Tensor& t) { alive_.push_back(t); }

  // One block per sample for all rounds and the dispatch, and one for the sums over the batch.
  void allocate_workspaces() {
    int64_t groups = 0;
    for (int64_t t = 0; t < count_; ++t) {
      gradients_[t].dense = in_.variant == kPaper;
      gradients_[t].last_centres = icm_.dense.last_centres;
      gradients_[t].groups = group_count(batch_, icm_.rounds[t].chunks);
      if (in_.projected(t)) groups += gradients_[t].groups;
    }
    keep(allocate<A>(in_.x, batch_, [&](Arena<A>& arena) {
      for (int64_t t = 0; t < count_; ++t) layout_round(t, arena);
      layout_workspace(icm_, dispatch_, arena);
    }));
    const int64_t channels = in_.x.size(2);
    keep(torch::stable::new_empty(in_.x, Sizes{groups * channels * (channels + 1)}, kScalarType<A>));
    next_sums_ = alive_.back().template mutable_data_ptr<A>();
  }

  void layout_round(int64_t t, Arena<A>& arena) {
    const ClusterRound<A>& r = icm_.rounds[t];
    ClusterRoundGrad<A>& g = gradients_[t];
    layout_workspace(r, g, arena);
    g.product_grad = arena.take(g.dense && t > 0 ? r.tokens() * g.last_centres : 0);
    if (!in_.projected(t)) return;
    g.pooled_packed = arena.take(round_ops(A()).packed_size(r.centres(), r.channels));
    g.mean_packed = arena.take(round_ops(A()).packed_size(r.centres(), r.channels));
  }

  // Arguments and results of round t.
  void prepare(int64_t t) {
    ClusterRound<A>& r = icm_.rounds[t];
    ClusterRoundGrad<A>& g = gradients_[t];
    g.query = icm_.query[t];
    g.product = icm_.product[t];
    g.dispatch = t == 0 ? &icm_.dense : nullptr;
    if (t == 0) {
      g.keys_grad = view_of(out_.x);
    } else {
      const PerSample<A>& to = gradients_[t - 1].result_grad;
      g.keys_grad = {to.data, r.values.dtype, to.stride, r.channels, 1};
    }
    for (int i = 0; i < 4; ++i) {
      const Tensor& p = in_.projections[4 * t + i];
      out_.projections.push_back(
          torch::stable::new_empty(p, p.dim() == 2 ? Sizes{p.size(0), p.size(1)} : Sizes{p.size(0)}));
    }
    if (!in_.projected(t)) return;
    for (int which = 0; which < 2; ++which) {
      const Tensor& weight = out_.projections[4 * t + 2 * which];
      const Tensor& bias = out_.projections[4 * t + 2 * which + 1];
      const DType dtype = dtype_of(weight, "projections");
      g.weight_grad[which] = {weight.mutable_data_ptr(), dtype, 0, r.channels, 1};
      g.bias_grad[which] = {bias.mutable_data_ptr(), dtype, 0, r.channels, 1};
    }
    r.key_packed = packer_.add(r.key_weight, true);
    g.key_packed = packer_.add(r.key_weight, false);
    g.value_packed = packer_.add(icm_.rows_of(in_.projections[4 * t + 2]), false);
    g.key_weight_sums = next_sums_;
    g.key_bias_sums = g.key_weight_sums + g.groups * r.channels * r.channels;
    next_sums_ = g.key_bias_sums + g.groups * r.channels;
  }

  const IcmInputs& in_;
  Icm<A> icm_;
  int64_t count_, batch_;
  std::vector<ClusterRoundGrad<A>> gradients_;
  Packer<A> packer_;
  IcmDispatch<A> dispatch_;
  std::vector<Tensor> alive_;
  A* next_sums_ = nullptr;
  Gradients out_;
};

// x [B, N, C]; projections, alpha, beta, grids, hw as in IcmInputs
std::tuple<Tensor, Tensor, Tensor> icm(const Tensor& x, const std::vector<Tensor>& projections,
                                       const Tensor& alpha, const Tensor& beta, const Sizes& grids,
                                       const Sizes& hw, int64_t variant) {
  const IcmInputs in{x, projections, alpha, beta, grids, hw, variant};
  check_icm(in);
  return compute_type(x) == ScalarType::Double ? forward<double>(in) : forward<float>(in);
}

// grad [B, N, C] of the output -> the gradients of x, projections, alpha and beta
std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> icm_backward(const Tensor& grad, const Tensor& x,
                                                                     const std::vector<Tensor>& projections,
                                                                     const Tensor& alpha, const Tensor& beta,
                                                                     const Tensor& labels,
                                                                     const Tensor& saved, const Sizes& grids,
                                                                     const Sizes& hw, int64_t variant) {
  const IcmInputs in{x, projections, alpha, beta, grids, hw, variant};
  check_icm(in);
  check_like(grad, x, "grad");
  Gradients out = compute_type(x) == ScalarType::Double ? Backward<double>(in, grad, labels, saved).run()
                                                        : Backward<float>(in, grad, labels, saved).run();
  return {out.x, out.projections, out.alpha, out.beta};
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("icm", TORCH_BOX(&frd::icm));
  m.impl("icm_backward", TORCH_BOX(&frd::icm_backward));
}
