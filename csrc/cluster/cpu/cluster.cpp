// The CPU operators `cluster`, one round of clustering on given keys and values, and `cluster_dispatch`.
#include <tuple>

#include "cluster/cpu/launch.h"
#include "core/layout.h"

namespace frd {
namespace {

using ClusterResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using ClusterGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The round with its inputs. k, v [B, N, C]; alpha, beta [1]; grid (rows, columns); hw (H, W)
template <class A>
ClusterRound<A> make_round(const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& beta,
                           const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  ClusterRound<A> r{};
  r.batch = k.size(0);
  r.channels = k.size(2);
  r.height = hw[0];
  r.width = hw[1];
  r.grid_height = grid[0];
  r.grid_width = grid[1];
  r.chunks = chunk_count(r.tokens(), r.centres());
  r.keys = view_of(k);
  r.values = view_of(v);
  r.weighted = aggregate == 1;
  r.alpha = *check_gate(alpha, k, 1, "alpha").const_data_ptr<A>();
  r.order = r.alpha;
  r.beta = *check_gate(beta, k, 1, "beta").const_data_ptr<A>();
  return r;
}

// labels [B, N], contiguous: 0 within mask [B, N] bool, else -1.
void label_mask(const Tensor& mask, Tensor& labels) {
  const int64_t batch = labels.size(0);
  const int64_t tokens = labels.size(1);
  check_mask(mask, batch, tokens);
  const bool* in = static_cast<const bool*>(mask.const_data_ptr());
  int32_t* out = static_cast<int32_t*>(labels.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < tokens; ++n)
      out[b * tokens + n] = in[b * mask.stride(0) + n * mask.stride(1)] ? 0 : -1;
}

// The layout of `saved` for one round.
template <class A>
SavedRound saved_layout(const ClusterRound<A>& r) {
  return saved_round(0, r.tokens(), r.centres(), r.channels, 0, true);
}

// labels [B, N], contiguous.
template <class A>
PerSample<int32_t> labels_of(const ClusterRound<A>& r, const Tensor& labels) {
  return {static_cast<int32_t*>(const_cast<void*>(labels.const_data_ptr())), r.tokens()};
}

// k, v [B, N, C], mask [B, N] bool, alpha, beta [1] -> centres [B, O, C], labels [B, N], similarity [B, N],
// counts [B, O], saved [B, L]
template <class A>
ClusterResults forward(const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                       const Tensor& alpha, const Tensor& beta, const Sizes& grid, const Sizes& hw,
                       int64_t aggregate) {
  ClusterRound<A> r = make_round<A>(k, v, alpha, beta, grid, hw, aggregate);
  const int64_t batch = r.batch;
  const int64_t tokens = r.tokens();
  Tensor centres = torch::stable::new_empty(v, Sizes{batch, r.centres(), r.channels});
  Tensor labels = torch::stable::new_empty(k, Sizes{batch, tokens}, ScalarType::Int);
  Tensor similarity = torch::stable::new_empty(k, Sizes{batch, tokens}, kScalarType<A>);
  Tensor counts = torch::stable::new_empty(k, Sizes{batch, r.centres()}, ScalarType::Int);
  Tensor saved = torch::stable::new_empty(k, Sizes{batch, saved_layout(r).end}, kScalarType<A>);
  bind_saved(r, saved_layout(r), saved);
  Tensor workspace = allocate<A>(k, batch, [&](Arena<A>& arena) { layout_workspace(r, arena); });
  r.labels = labels_of(r, labels);
  r.similarity = {similarity.mutable_data_ptr<A>(), tokens};
  r.counts = {static_cast<int32_t*>(counts.mutable_data_ptr()), r.centres()};
  r.result_view = view_of(centres);
  r.has_mask = mask.has_value();
  if (r.has_mask) label_mask(*mask, labels);
  run_round(r);
  for_tasks(batch, [&](int64_t begin, int64_t end) { round_ops(A()).write_results(r, begin, end); });
  return {centres, labels, similarity, counts, saved};
}

// grad_centres [B, O, C], grad_similarity [B, N], labels [B, N], saved [B, L] -> grad_k, grad_v [B, N, C],
// grad_alpha, grad_beta [1]
template <class A>
ClusterGradients backward(const Tensor& grad_centres, const Tensor& grad_similarity, const Tensor& k,
                          const Tensor& v, const Tensor& alpha, const Tensor& beta, const Tensor& labels,
                          const Tensor& saved, const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  ClusterRound<A> r = make_round<A>(k, v, alpha, beta, grid, hw, aggregate);
  FRD_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == r.batch && labels.size(1) == r.tokens() &&
                      labels.scalar_type() == ScalarType::Int && labels.is_contiguous(),
                  "frd: labels must be the contiguous int32 [B, N] of the forward pass");
  FRD_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == r.batch && saved.size(1) == saved_layout(r).end &&
                      saved.scalar_type() == kScalarType<A> && saved.is_contiguous(),
                  "frd: saved must be what the forward pass returned");
  FRD_CHECK_VALUE(grad_centres.dim() == 3 && grad_centres.size(0) == r.batch &&
                      grad_centres.size(1) == r.centres() && grad_centres.size(2) == r.channels,
                  "frd: grad_centres must be [B, O, C]");
  FRD_CHECK_VALUE(grad_similarity.dim() == 2 && grad_similarity.size(0) == r.batch &&
                      grad_similarity.size(1) == r.tokens(),
                  "frd: grad_similarity must be [B, N]");
  bind_saved(r, saved_layout(r), saved);
  r.labels = labels_of(r, labels);
  // The labels of the forward pass hold the mask.
  r.has_mask = true;

  ClusterRoundGrad<A> g{};
  Tensor workspace = allocate<A>(k, r.batch, [&](Arena<A>& arena) { layout_workspace(r, g, arena); });
  const Tensor of_centres = in_layout(in_type(grad_centres, kScalarType<A>));
  const Tensor of_similarity = in_layout(in_type(grad_similarity, kScalarType<A>));
  g.result_grad = {const_cast<A*>(of_centres.const_data_ptr<A>()), r.centres() * r.channels};
  g.similarity_grad = {const_cast<A*>(of_similarity.const_data_ptr<A>()), r.tokens()};
  Tensor grad_k = new_like_tokens(k);
  Tensor grad_v = new_like_tokens(v);
  g.keys_grad = view_of(grad_k);
  g.values_grad = view_of(grad_v);
  g.groups = group_count(r.batch, r.chunks);
  run_round_grad(r, g);

  Tensor grad_alpha = torch::stable::new_empty(alpha, Sizes{1});
  Tensor grad_beta = torch::stable::new_empty(beta, Sizes{1});
  *grad_alpha.mutable_data_ptr<A>() = sum_gate_grad(g.gate_grad, r.batch, r.chunks, 0);
  *grad_beta.mutable_data_ptr<A>() = sum_gate_grad(g.gate_grad, r.batch, r.chunks, 1);
  return {grad_k, grad_v, grad_alpha, grad_beta};
}

// k, v [B, N, C], mask [B, N] bool, alpha, beta [1] -> centres [B, O, C], labels [B, N], similarity [B, N],
// counts [B, O], saved [B, L]
ClusterResults cluster(const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                       const Tensor& alpha, const Tensor& beta, const Sizes& grid, const Sizes& hw,
                       int64_t aggregate) {
  check_cluster(k, v, grid, hw, aggregate);
  const auto run = compute_type(k) == ScalarType::Double ? forward<double> : forward<float>;
  return run(k, v, mask, alpha, beta, grid, hw, aggregate);
}

// grad_centres [B, O, C], grad_similarity [B, N], k, v [B, N, C], labels [B, N], saved [B, L] -> grad_k,
// grad_v [B, N, C], grad_alpha, grad_beta [1]
ClusterGradients cluster_backward(const Tensor& grad_centres, const Tensor& grad_similarity, const Tensor& k,
                                  const Tensor& v, const Tensor& alpha, const Tensor& beta,
                                  const Tensor& labels, const Tensor& saved, const Sizes& grid,
                                  const Sizes& hw, int64_t aggregate) {
  check_cluster(k, v, grid, hw, aggregate);
  const auto run = compute_type(k) == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_centres, grad_similarity, k, v, alpha, beta, labels, saved, grid, hw, aggregate);
}

const ClusterDispatchOps<float>& cluster_dispatch_ops(float) { return cluster_dispatch_kernels().f32; }
const ClusterDispatchOps<double>& cluster_dispatch_ops(double) { return cluster_dispatch_kernels().f64; }

// labels [B, N], contiguous. They index memory, so they must be checked.
void check_range(const Tensor& labels, int64_t centres) {
  const int32_t* at = static_cast<const int32_t*>(labels.const_data_ptr());
  int32_t low = -1;
  int32_t high = -1;
  for (int64_t i = 0; i < labels.numel(); ++i) {
    low = std::min(low, at[i]);
    high = std::max(high, at[i]);
  }
  FRD_CHECK_VALUE(low >= -1 && high < centres, "frd: labels must lie in -1 .. ", centres - 1, ", got ",
                  low < -1 ? low : high);
}

// The arguments of both directions. centres [B, O, C], labels, similarity [B, N]; the tensors in `alive` must
// outlive the result.
template <class A>
ClusterDispatch<A> make_dispatch(const Tensor& centres, const Tensor& labels, const Tensor& similarity,
                                 std::vector<Tensor>& alive) {
  alive = {in_layout(labels), in_layout(similarity)};
  ClusterDispatch<A> d{};
  d.batch = centres.size(0);
  d.tokens = labels.size(1);
  d.channels = centres.size(2);
  d.centres = centres.size(1);
  check_range(alive[0], d.centres);
  d.centre_rows = view_of(centres);
  d.labels = {static_cast<int32_t*>(const_cast<void*>(alive[0].const_data_ptr())), d.tokens};
  d.similarity = {const_cast<A*>(alive[1].const_data_ptr<A>()), d.tokens};
  return d;
}

// centres [B, O, C], labels, similarity [B, N] -> out [B, N, C]
template <class A>
Tensor dispatch_forward(const Tensor& centres, const Tensor& labels, const Tensor& similarity,
                        bool channels_first) {
  std::vector<Tensor> alive;
  ClusterDispatch<A> d = make_dispatch<A>(centres, labels, similarity, alive);
  Tensor out = new_tokens(centres, d.batch, d.tokens, d.channels, channels_first);
  d.out = view_of(out);
  d.chunks = chunk_count(d.tokens, 1);
  for_tasks(d.batch * d.chunks,
            [&](int64_t begin, int64_t end) { cluster_dispatch_ops(A()).forward(d, begin, end); });
  return out;
}

// grad [B, N, C] -> centre_grad [B, O, C], similarity_grad [B, N]
template <class A>
std::tuple<Tensor, Tensor> dispatch_backward(const Tensor& grad, const Tensor& centres, const Tensor& labels,
                                             const Tensor& similarity) {
  std::vector<Tensor> alive;
  ClusterDispatch<A> d = make_dispatch<A>(centres, labels, similarity, alive);
  Tensor centre_grad = torch::stable::new_empty(centres, Sizes{d.batch, d.centres, d.channels});
  Tensor similarity_grad = torch::stable::new_empty(similarity, Sizes{d.batch, d.tokens});
  d.grad = view_of(grad);
  d.centre_grad = view_of(centre_grad);
  d.similarity_grad = {similarity_grad.mutable_data_ptr<A>(), d.tokens};
  d.chunks = chunk_count(d.tokens, d.centres);
  Tensor workspace = allocate<A>(centres, d.batch, [&](Arena<A>& arena) {
    d.chunk_sums = arena.take(d.chunks * d.centres * d.channels);
  });
  const ClusterDispatchOps<A>& ops = cluster_dispatch_ops(A());
  const auto stage = [&](typename ClusterDispatchOps<A>::Stage run, int64_t tasks) {
    for_tasks(tasks, [&](int64_t begin, int64_t end) { run(d, begin, end); });
  };
  stage(ops.grad_sums, d.batch * d.chunks);
  stage(ops.centre_grad, d.batch * d.blocks());
  return {centre_grad, similarity_grad};
}

// centres [B, O, C], labels, similarity [B, N] -> [B, N, C]
Tensor cluster_dispatch(const Tensor& centres, const Tensor& labels, const Tensor& similarity,
                        bool channels_first) {
  check_dispatch(centres, labels, similarity);
  const auto run =
      compute_type(centres) == ScalarType::Double ? dispatch_forward<double> : dispatch_forward<float>;
  return run(centres, labels, similarity, channels_first);
}

// grad [B, N, C], centres [B, O, C], labels, similarity [B, N] -> centre_grad [B, O, C], similarity_grad [B,
// N]
std::tuple<Tensor, Tensor> cluster_dispatch_backward(const Tensor& grad, const Tensor& centres,
                                                     const Tensor& labels, const Tensor& similarity) {
  check_dispatch(centres, labels, similarity);
  FRD_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == labels.size(0) && grad.size(1) == labels.size(1) &&
                      grad.size(2) == centres.size(2) && grad.scalar_type() == centres.scalar_type(),
                  "frd: grad must be [B, N, C] in the dtype of centres");
  const auto run =
      compute_type(centres) == ScalarType::Double ? dispatch_backward<double> : dispatch_backward<float>;
  return run(grad, centres, labels, similarity);
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("cluster", TORCH_BOX(&frd::cluster));
  m.impl("cluster_backward", TORCH_BOX(&frd::cluster_backward));
  m.impl("cluster_dispatch", TORCH_BOX(&frd::cluster_dispatch));
  m.impl("cluster_dispatch_backward", TORCH_BOX(&frd::cluster_dispatch_backward));
}
