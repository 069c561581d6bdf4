// The operators cluster_backward and icm_backward for CUDA tensors as chains of launches.
#include <algorithm>
#include <tuple>

#include "cluster/cuda/chain_call.h"
#include "cluster/cuda/chain_grad_plan.h"
#include "core/cuda_launch.h"
#include "core/layout.h"

namespace frd {
namespace chain {
namespace {

// What the forward returned.
void bind_kept(GradArgs& a, const Tensor& labels, const Tensor& saved) {
  const auto has_size = [&](const Tensor& t, int64_t size, ScalarType type) {
    return t.dim() == 2 && t.size(0) == a.batch && t.size(1) == size && t.scalar_type() == type &&
           t.is_contiguous();
  };
  FRD_CHECK_VALUE(has_size(labels, a.label_stride, ScalarType::Int),
                  "frd: labels must be what the forward pass returned");
  FRD_CHECK_VALUE(has_size(saved, a.layout.size, ScalarType::Float),
                  "frd: saved must be what the forward pass returned");
  a.labels = static_cast<const int32_t*>(labels.const_data_ptr());
  a.saved = static_cast<const float*>(saved.const_data_ptr());
}

// The arguments that the rounds of a call determine.
GradArgs args_of(const Call& call, bool icm, bool dense) {
  GradArgs a{};
  a.batch = static_cast<int>(call.batch), a.channels = call.channels, a.count = call.count;
  a.dense = dense;
  std::copy(call.round, call.round + call.count, a.round);
  a.label_stride = call.label_stride;
  a.layout = saved_layout(call.round, call.count, call.channels, icm, dense);
  return a;
}

void run(const GradArgs& a, const Gradients& to, bool icm, const Tensor& like, cudaStream_t stream) {
  Backward backward(a, to, icm);
  const Tensor memory = torch::stable::new_empty(like, Sizes{backward.size()}, ScalarType::Float);
  STD_CUDA_CHECK(backward.run(static_cast<float*>(memory.mutable_data_ptr()), stream));
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// grad_centres [B, O, C], grad_similarity [B, N] -> of k, v [B, N, C], alpha and beta [1]
std::tuple<Tensor, Tensor, Tensor, Tensor> cluster_backward(const Tensor& grad_centres,
                                                            const Tensor& grad_similarity, const Tensor& k,
                                                            const Tensor& v, const Tensor& alpha,
                                                            const Tensor& beta, const Tensor& labels,
                                                            const Tensor& saved, const Sizes& grid,
                                                            const Sizes& hw, int64_t aggregate) {
  const CudaScope scope(k);
  check_cluster(k, v, grid, hw, aggregate);
  Call call(k);
  const Round& r = call.add_round(hw[0], hw[1], grid[0], grid[1]);
  GradArgs a = args_of(call, false, false);
  a.weighted = aggregate == 1;
  bind_kept(a, labels, saved);
  a.alpha = call.gate(alpha, 1, "alpha"), a.beta = call.gate(beta, 1, "beta");
  FRD_CHECK_VALUE(grad_centres.dim() == 3 && grad_centres.size(0) == a.batch &&
                      grad_centres.size(1) == r.centres() && grad_centres.size(2) == a.channels,
                  "frd: grad_centres must be [B, O, C]");
  FRD_CHECK_VALUE(grad_similarity.dim() == 2 && grad_similarity.size(0) == a.batch &&
                      grad_similarity.size(1) == r.tokens(),
                  "frd: grad_similarity must be [B, N]");
  a.mean_grad = static_cast<float*>(const_cast<void*>(call.keep(in_type(grad_centres, ScalarType::Float))));
  a.mean_grad_row = a.channels;
  const Tensor of_similarity = in_type(grad_similarity, ScalarType::Float);
  a.similarity_grad = static_cast<const float*>(of_similarity.const_data_ptr());
  a.similarity_batch = of_similarity.stride(0), a.similarity_token = of_similarity.stride(1);
  a.keys = view_of(k), a.values = view_of(v);
  Tensor grad_k = new_like_tokens(k), grad_v = new_like_tokens(v);
  Tensor grad_alpha = torch::stable::new_empty(alpha, Sizes{1}),
         grad_beta = torch::stable::new_empty(beta, Sizes{1});
  Gradients to{};
  to.keys = view_of(grad_k), to.values = view_of(grad_v);
  to.alpha = floats(grad_alpha), to.beta = floats(grad_beta);
  run(a, to, false, k, scope.stream());
  return {grad_k, grad_v, grad_alpha, grad_beta};
}

// grad [B, N, C] -> of x [B, N, C], the projections, alpha and beta [1], released [T]
std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> icm_backward(const Tensor& grad, const Tensor& x,
                                                                     const std::vector<Tensor>& projections,
                                                                     const Tensor& alpha, const Tensor& beta,
                                                                     const Tensor& labels,
                                                                     const Tensor& saved, const Sizes& grids,
                                                                     const Sizes& hw, int64_t variant) {
  const CudaScope scope(x);
  const IcmInputs in{x, projections, alpha, beta, grids, hw, variant};
  check_icm(in);
  check_like(grad, x, "grad");
  Call call(x);
  call.add_rounds(in);
  const bool dense = variant == kPaper;
  const int64_t gates = dense ? 1 : in.count();
  GradArgs a = args_of(call, true, dense);
  a.weighted = !dense;
  bind_kept(a, labels, saved);
  a.alpha = call.gate(alpha, gates, "alpha"), a.beta = call.gate(beta, gates, "beta");
  a.values = view_of(x), a.grad = view_of(grad);
  Tensor grad_x = new_like_tokens(x);
  Tensor grad_alpha = torch::stable::new_empty(alpha, Sizes{gates}),
         grad_beta = torch::stable::new_empty(beta, Sizes{gates});
  std::vector<Tensor> grads;
  for (const Tensor& p : projections)
    grads.push_back(
        torch::stable::new_empty(p, p.dim() == 2 ? Sizes{p.size(0), p.size(1)} : Sizes{p.size(0)}));
  Gradients to{};
  to.keys = view_of(grad_x);
  to.alpha = floats(grad_alpha), to.beta = floats(grad_beta);
  const auto data = [&](int64_t i) { return grads[i].mutable_data_ptr(); };
  for (int64_t t = 0; t < in.count(); ++t)
    if (in.projected(t)) to.projection[t] = {data(4 * t), data(4 * t + 1), data(4 * t + 2), data(4 * t + 3)};
  run(a, to, true, x, scope.stream());
  return {grad_x, grads, grad_alpha, grad_beta};
}

}  // namespace
}  // namespace chain
}  // namespace frd

FRD_CHAIN_LIBRARY(m) {
  m.impl("cluster_backward", TORCH_BOX(&frd::chain::cluster_backward));
  m.impl("icm_backward", TORCH_BOX(&frd::chain::icm_backward));
}
