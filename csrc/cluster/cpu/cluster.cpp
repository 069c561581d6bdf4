// One round of clustering on given keys and values.
#include <tuple>

#include "cluster/cpu/launch.h"
#include "core/layout.h"

namespace frd {
namespace {

template <class A>
Round<A> make_round(const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& beta,
                    const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  Round<A> r{};
  r.batch = k.size(0);
  r.channels = k.size(2);
  r.height = hw[0];
  r.width = hw[1];
  r.rows = grid[0];
  r.columns = grid[1];
  r.chunks = chunk_count(r.tokens(), r.centres());
  r.keys = view_of(k);
  r.values = view_of(v);
  r.weighted = aggregate == 1;
  r.alpha = *check_gate(alpha, k, 1, "alpha").const_data_ptr<A>();
  r.order = r.alpha;
  r.beta = *check_gate(beta, k, 1, "beta").const_data_ptr<A>();
  return r;
}

// Labels the tokens that take no part -1, the others 0. mask [B, N] bool, labels [B, N] contiguous
void mark(const Tensor& mask, Tensor& labels) {
  const int64_t batch = labels.size(0);
  const int64_t tokens = labels.size(1);
  check_mask(mask, batch, tokens);
  const bool* in = static_cast<const bool*>(mask.const_data_ptr());
  int32_t* out = static_cast<int32_t*>(labels.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < tokens; ++n)
      out[b * tokens + n] = in[b * mask.stride(0) + n * mask.stride(1)] ? 0 : -1;
}

template <class A>
SavedRound saved_of(const Round<A>& r) {
  return saved_round(0, r.tokens(), r.centres(), r.channels, 0, true);
}

// labels [B, N]
template <class A>
PerItem<int32_t> labels_of(const Round<A>& r, const Tensor& labels) {
  return {static_cast<int32_t*>(const_cast<void*>(labels.const_data_ptr())), r.tokens()};
}

template <class A>
std::vector<Tensor> forward(const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                            const Tensor& alpha, const Tensor& beta, const Sizes& grid, const Sizes& hw,
                            int64_t aggregate) {
  Round<A> r = make_round<A>(k, v, alpha, beta, grid, hw, aggregate);
  const int64_t batch = r.batch;
  const int64_t tokens = r.tokens();
  Tensor centres = torch::stable::new_empty(v, Sizes{batch, r.centres(), r.channels});
  Tensor labels = torch::stable::new_empty(k, Sizes{batch, tokens}, ScalarType::Int);
  Tensor similarity = torch::stable::new_empty(k, Sizes{batch, tokens}, kScalarType<A>);
  Tensor counts = torch::stable::new_empty(k, Sizes{batch, r.centres()}, ScalarType::Int);
  Tensor saved = torch::stable::new_empty(k, Sizes{batch, saved_of(r).end}, kScalarType<A>);
  bind_saved(r, saved_of(r), saved);
  Tensor workspace = allocate<A>(k, batch, [&](Arena<A>& arena) { layout_workspace(r, arena); });
  r.labels = labels_of(r, labels);
  r.similarity = {similarity.mutable_data_ptr<A>(), tokens};
  r.counts = {static_cast<int32_t*>(counts.mutable_data_ptr()), r.centres()};
  r.result_view = view_of(centres);
  r.masked = mask.has_value();
  if (r.masked) mark(*mask, labels);
  run_round(r);
  for_units(batch, [&](int64_t begin, int64_t end) { round_ops(A()).publish(r, begin, end); });
  return {centres, labels, similarity, counts, saved};
}

// grad_centres [B, O, C], grad_similarity [B, N]
template <class A>
std::vector<Tensor> backward(const Tensor& grad_centres, const Tensor& grad_similarity, const Tensor& k,
                             const Tensor& v, const Tensor& alpha, const Tensor& beta, const Tensor& labels,
                             const Tensor& saved, const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  Round<A> r = make_round<A>(k, v, alpha, beta, grid, hw, aggregate);
  FRD_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == r.batch && labels.size(1) == r.tokens() &&
                      labels.scalar_type() == ScalarType::Int && labels.is_contiguous(),
                  "frd: labels must be the contiguous int32 [B, N] of the forward pass");
  FRD_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == r.batch && saved.size(1) == saved_of(r).end &&
                      saved.scalar_type() == kScalarType<A> && saved.is_contiguous(),
                  "frd: saved must be what the forward pass returned");
  FRD_CHECK_VALUE(grad_centres.dim() == 3 && grad_centres.size(0) == r.batch &&
                      grad_centres.size(1) == r.centres() && grad_centres.size(2) == r.channels,
                  "frd: grad_centres must be [B, O, C]");
  FRD_CHECK_VALUE(grad_similarity.dim() == 2 && grad_similarity.size(0) == r.batch &&
                      grad_similarity.size(1) == r.tokens(),
                  "frd: grad_similarity must be [B, N]");
  bind_saved(r, saved_of(r), saved);
  r.labels = labels_of(r, labels);
  r.masked = true;  // the labels say it

  RoundGrad<A> g{};
  Tensor workspace = allocate<A>(k, r.batch, [&](Arena<A>& arena) { layout_workspace(r, g, arena); });
  const Tensor of_centres = in_layout(torch::stable::to(grad_centres, kScalarType<A>));
  const Tensor of_similarity = in_layout(torch::stable::to(grad_similarity, kScalarType<A>));
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

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Five cluster(const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, const Tensor& alpha,
             const Tensor& beta, const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  check_cluster(k, v, grid, hw, aggregate);
  const auto run = compute_type(k) == ScalarType::Double ? forward<double> : forward<float>;
  auto out = run(k, v, mask, alpha, beta, grid, hw, aggregate);
  return {out[0], out[1], out[2], out[3], out[4]};
}

Four cluster_backward(const Tensor& grad_centres, const Tensor& grad_similarity, const Tensor& k,
                      const Tensor& v, const Tensor& alpha, const Tensor& beta, const Tensor& labels,
                      const Tensor& saved, const Sizes& grid, const Sizes& hw, int64_t aggregate) {
  check_cluster(k, v, grid, hw, aggregate);
  const auto run = compute_type(k) == ScalarType::Double ? backward<double> : backward<float>;
  auto out = run(grad_centres, grad_similarity, k, v, alpha, beta, labels, saved, grid, hw, aggregate);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("cluster", TORCH_BOX(&frd::cluster));
  m.impl("cluster_backward", TORCH_BOX(&frd::cluster_backward));
}
