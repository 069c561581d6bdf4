// The operators cluster_backward and icm_backward on CUDA: checks, allocation, launch.
#include <climits>
#include <tuple>

#include "cluster/cuda/to_be_deleted/grad_plan.h"
#include "cluster/cuda/to_be_deleted/team.h"
#include "cluster/op.h"
#include "core/cuda_device.h"
#include "core/cuda_launch.h"
#include "core/layout.h"

namespace frd {
namespace {

cudaError_t launch(const IcmGradArgs& a, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::f64:
      return icm_grad_f64(a, stream);
    case DType::f16:
      return icm_grad_f16(a, stream);
    case DType::bf16:
      return icm_grad_bf16(a, stream);
    default:
      return icm_grad_f32(a, stream);
  }
}

// Allocates what the kernels need beyond inputs and outputs, and runs them.
void run(IcmGradArgs& a, const Tensor& like, cudaStream_t stream) {
  int team = 0, shared_bytes = 0;
  STD_CUDA_CHECK(team_blocks(&team));
  STD_CUDA_CHECK(device_attribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  plan_grads(a, team, shared_bytes);
  const ScalarType type = compute_type(like);
  const Tensor workspace = torch::stable::new_empty(like, Sizes{a.batch, a.workspace_stride}, type);
  const Tensor block_memory = torch::stable::new_empty(like, Sizes{a.batch * a.team, a.block_rows}, type);
  const Tensor gates =
      torch::stable::new_empty(like, Sizes{a.batch, a.gates, kGradBlocks, 2}, ScalarType::Double);
  const Tensor parts =
      torch::stable::new_empty(like, Sizes{a.first_part[2 * a.count], a.channels + 1, a.channels}, type);
  a.workspace = workspace.mutable_data_ptr();
  a.block_memory = a.block_rows > 0 ? block_memory.mutable_data_ptr() : nullptr;
  a.gate_parts = static_cast<double*>(gates.mutable_data_ptr());
  a.weight_parts = parts.mutable_data_ptr();
  STD_CUDA_CHECK(launch(a, stream));
}

// hw, grid: two sides
void set_grid(RoundArgs& r, const int64_t* hw, const int64_t* grid) {
  FRD_CHECK_VALUE(grid[0] * grid[1] <= INT_MAX / 16 && hw[0] * hw[1] <= INT_MAX / 16,
                  "frd: too many tokens or centres for CUDA");
  r.height = static_cast<int>(hw[0]), r.width = static_cast<int>(hw[1]);
  r.rows = static_cast<int>(grid[0]), r.columns = static_cast<int>(grid[1]);
}

void check_kept(const Tensor& labels, const Tensor& saved, const IcmGradArgs& a, const Tensor& x) {
  FRD_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == a.batch && labels.size(1) == a.label_stride &&
                      labels.scalar_type() == ScalarType::Int && labels.is_contiguous(),
                  "frd: labels must be what the forward pass returned");
  FRD_CHECK_VALUE(saved.dim() == 2 && saved.size(0) == a.batch && saved.size(1) == a.saved_stride &&
                      saved.scalar_type() == compute_type(x) && saved.is_contiguous(),
                  "frd: saved must be what the forward pass returned");
}

void bind_kept(IcmGradArgs& a, const Tensor& labels, const Tensor& saved) {
  a.labels = static_cast<int32_t*>(const_cast<void*>(labels.const_data_ptr()));
  a.saved = const_cast<void*>(saved.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cluster_backward(const Tensor& grad_centres,
                                                            const Tensor& grad_similarity, const Tensor& k,
                                                            const Tensor& v, const Tensor& alpha_,
                                                            const Tensor& beta_, const Tensor& labels,
                                                            const Tensor& saved, const Sizes& grid,
                                                            const Sizes& hw, int64_t aggregate) {
  check_cluster(k, v, grid, hw, aggregate);
  const Tensor alpha = check_gate(alpha_, k, 1, "alpha"), beta = check_gate(beta_, k, 1, "beta");
  IcmGradArgs a{};
  a.batch = k.size(0), a.channels = static_cast<int>(k.size(2)), a.count = 1;
  RoundArgs& r = a.round[0];
  set_grid(r, hw.data(), grid.data());
  r.saved = saved_round(0, r.tokens(), r.centres(), a.channels, 0, true);
  a.label_stride = r.tokens(), a.saved_stride = r.saved.end;
  check_kept(labels, saved, a, k);
  FRD_CHECK_VALUE(grad_centres.dim() == 3 && grad_centres.size(0) == a.batch &&
                      grad_centres.size(1) == r.centres() && grad_centres.size(2) == a.channels,
                  "frd: grad_centres must be [B, O, C]");
  FRD_CHECK_VALUE(grad_similarity.dim() == 2 && grad_similarity.size(0) == a.batch &&
                      grad_similarity.size(1) == r.tokens(),
                  "frd: grad_similarity must be [B, N]");
  const CudaScope scope(k);
  bind_kept(a, labels, saved);
  a.dtype = dtype_of(k, "k");
  a.keys = view_of(k), a.values = view_of(v);
  a.weighted = aggregate == 1;
  a.alpha = alpha.const_data_ptr(), a.beta = beta.const_data_ptr(), a.gates = 1;
  const ScalarType type = compute_type(k);
  const Tensor of_centres =
      grad_centres.scalar_type() == k.scalar_type() ? grad_centres : in_layout(in_type(grad_centres, type));
  const Tensor of_similarity = in_type(grad_similarity, type);
  a.grad = view_of(of_centres);
  a.similarity_grad = of_similarity.const_data_ptr();
  a.similarity_batch = of_similarity.stride(0), a.similarity_token = of_similarity.stride(1);
  Tensor grad_k = new_like_tokens(k), grad_v = new_like_tokens(v);
  Tensor grad_alpha = torch::stable::new_empty(alpha, Sizes{1}),
         grad_beta = torch::stable::new_empty(beta, Sizes{1});
  a.keys_grad = view_of(grad_k), a.values_grad = view_of(grad_v);
  a.alpha_grad = grad_alpha.mutable_data_ptr(), a.beta_grad = grad_beta.mutable_data_ptr();
  run(a, k, scope.stream());
  return {grad_k, grad_v, grad_alpha, grad_beta};
}

// Binds the rounds' shapes and projections; contiguous copies of these live in `alive`.
void bind_rounds(IcmGradArgs& a, const IcmInputs& in, std::vector<Tensor>& alive) {
  const auto bind = [&](const Tensor& t) {
    alive.push_back(in_layout(t));
    return alive.back().const_data_ptr();
  };
  for (int t = 0; t < a.count; ++t) {
    RoundArgs& r = a.round[t];
    set_grid(r, t == 0 ? in.hw.data() : &in.grids[2 * t - 2], &in.grids[2 * t]);
    r.labels = a.label_stride;
    a.label_stride += r.tokens();
    if (!in.projected(t)) continue;
    r.key_weight = bind(in.projections[4 * t]), r.key_bias = bind(in.projections[4 * t + 1]);
    r.value_weight = bind(in.projections[4 * t + 2]), r.value_bias = bind(in.projections[4 * t + 3]);
    a.projected = true;
  }
  a.columns = a.round[a.count - 1].centres();
  for (int t = 0; t < a.count; ++t) {
    RoundArgs& r = a.round[t];
    r.saved =
        saved_round(a.saved_stride, r.tokens(), r.centres(), a.channels, a.dense ? a.columns : 0, t == 0);
    a.saved_stride = r.saved.end;
  }
}

// Allocates the gradients of the projections.
std::vector<Tensor> bind_projection_grads(IcmGradArgs& a, const IcmInputs& in) {
  std::vector<Tensor> grads;
  for (const Tensor& p : in.projections)
    grads.push_back(
        torch::stable::new_empty(p, p.dim() == 2 ? Sizes{p.size(0), p.size(1)} : Sizes{p.size(0)}));
  for (int t = 0; t < a.count; ++t)
    if (in.projected(t))
      a.projection_grad[t] = {grads[4 * t].mutable_data_ptr(), grads[4 * t + 1].mutable_data_ptr(),
                              grads[4 * t + 2].mutable_data_ptr(), grads[4 * t + 3].mutable_data_ptr()};
  return grads;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor, Tensor> icm_backward(
    const Tensor& grad, const Tensor& x, const std::vector<Tensor>& projections, const Tensor& alpha_,
    const Tensor& beta_, const Tensor& labels, const Tensor& saved, const Sizes& grids, const Sizes& hw,
    int64_t variant) {
  const IcmInputs in{x, projections, alpha_, beta_, grids, hw, variant};
  check_icm(in);
  check_like(grad, x, "grad");
  FRD_CHECK_VALUE(in.count() <= kMaxRounds, "frd: at most ", kMaxRounds, " rounds on CUDA, got ", in.count());
  IcmGradArgs a{};
  a.dtype = dtype_of(x, "x");
  a.batch = x.size(0), a.channels = static_cast<int>(x.size(2)), a.count = static_cast<int>(in.count());
  a.shared = a.dispatch = true;
  a.dense = variant == kPaper, a.weighted = variant == kReleased;
  a.gates = a.dense ? 1 : a.count;
  const Tensor alpha = check_gate(alpha_, x, a.gates, "alpha"), beta = check_gate(beta_, x, a.gates, "beta");
  const CudaScope scope(x);
  std::vector<Tensor> alive;
  bind_rounds(a, in, alive);
  check_kept(labels, saved, a, x);
  bind_kept(a, labels, saved);
  a.keys = a.values = view_of(x), a.grad = view_of(grad);
  a.alpha = alpha.const_data_ptr(), a.beta = beta.const_data_ptr();
  Tensor grad_x = new_like_tokens(x);
  Tensor grad_alpha = torch::stable::new_empty(alpha, Sizes{a.gates}),
         grad_beta = torch::stable::new_empty(beta, Sizes{a.gates});
  a.keys_grad = view_of(grad_x);
  a.alpha_grad = grad_alpha.mutable_data_ptr(), a.beta_grad = grad_beta.mutable_data_ptr();
  std::vector<Tensor> grads = bind_projection_grads(a, in);
  run(a, x, scope.stream());
  return {grad_x, grads, grad_alpha, grad_beta};
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) {
  m.impl("cluster_backward", TORCH_BOX(&frd::cluster_backward));
  m.impl("icm_backward", TORCH_BOX(&frd::icm_backward));
}
