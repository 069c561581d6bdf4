// The operators `cluster` and `icm` for CUDA tensors as chains of launches.
#include <algorithm>
#include <tuple>

#include "cluster/cuda/chain_call.h"
#include "cluster/cuda/chain_plan.h"
#include "core/cuda_launch.h"
#include "core/layout.h"

namespace frd {
namespace chain {
namespace {

// The arguments that a call determines; those of `icm` with that variant.
Forward args_of(const Call& call, bool icm, bool dense) {
  Forward a{};
  a.dtype = call.dtype, a.batch = call.batch;
  a.channels = call.channels, a.count = call.count;
  std::copy(call.round, call.round + call.count, a.round);
  a.label_stride = call.label_stride;
  a.dense = dense;
  a.at = saved_layout(a.round, a.count, a.channels, icm, dense);
  return a;
}

// What the backward takes: labels [B, sum of N_t] and saved [B, L].
struct Kept {
  Tensor labels, saved;
};
Kept make_kept(Forward& a, const Tensor& like) {
  Kept kept{torch::stable::new_empty(like, Sizes{a.batch, a.label_stride}, ScalarType::Int),
            torch::stable::new_empty(like, Sizes{a.batch, a.at.size}, ScalarType::Float)};
  a.labels = static_cast<int32_t*>(kept.labels.mutable_data_ptr());
  a.saved = static_cast<float*>(kept.saved.mutable_data_ptr());
  return kept;
}

// A part of the workspace, of which *to will be the address.
struct Part {
  float** to;
  int64_t floats;
};
Tensor make_workspace(const Tensor& like, const std::vector<Part>& parts) {
  const auto aligned = [](int64_t floats) { return (floats + 31) / 32 * 32; };
  int64_t size = 0;
  for (const Part& part : parts) size += aligned(part.floats);
  Tensor memory = torch::stable::new_empty(like, Sizes{size}, ScalarType::Float);
  float* at = static_cast<float*>(memory.mutable_data_ptr());
  for (const Part& part : parts) {
    *part.to = part.floats > 0 ? at : nullptr;
    at += aligned(part.floats);
  }
  return memory;
}

cudaError_t run_cluster(const Forward& a, cudaStream_t stream) {
  cudaError_t error = run_pool(a, Products{}, stream);
  if (error == cudaSuccess) error = run_assign(a, stream);
  return error == cudaSuccess ? run_aggregate(a, stream) : error;
}

// k, v [B, N, C], mask bool [B, N], alpha and beta [1]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cluster(const Tensor& k, const Tensor& v,
                                                           const std::optional<Tensor>& mask,
                                                           const Tensor& alpha, const Tensor& beta,
                                                           const Sizes& grid, const Sizes& hw,
                                                           int64_t aggregate) {
  const CudaScope scope(k);
  check_cluster(k, v, grid, hw, aggregate);
  Call call(k);
  const int64_t tokens = k.size(1), count = call.add_round(hw[0], hw[1], grid[0], grid[1]).centres();
  Forward a = args_of(call, false, false);
  a.keys = view_of(k), a.values = view_of(v);
  a.weighted = aggregate == 1, a.ordered = true;
  a.alpha = call.gate(alpha, 1, "alpha"), a.beta = call.gate(beta, 1, "beta");
  if (mask.has_value()) {
    check_mask(*mask, a.batch, tokens);
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_batch = mask->stride(0), a.mask_token = mask->stride(1);
  }
  Tensor centres = torch::stable::new_empty(v, Sizes{a.batch, count, k.size(2)});
  Tensor similarity = torch::stable::new_empty(k, Sizes{a.batch, tokens}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(k, Sizes{a.batch, count}, ScalarType::Int);
  a.centres = view_of(centres);
  a.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  a.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  const Kept kept = make_kept(a, k);
  if (a.batch > 0) {
    const Tensor memory = make_workspace(k, {{&a.pooled_values, a.batch * count * a.channels}});
    STD_CUDA_CHECK(run_cluster(a, scope.stream()));
  }
  return {centres, kept.labels, similarity, counts, kept.saved};
}

cudaError_t run_icm(const Forward& a, float* composed, cudaStream_t stream) {
  const Composition plan = plan_composition(a.round, a.count, a.channels, a.dtype, composed);
  Products keys = plan_first_keys(a);
  append(keys, plan.level[1]);
  cudaError_t error = run_pool(a, plan.level[0], stream);
  if (error == cudaSuccess && keys.count > 0) error = run_products(keys, stream);
  for (int level = 2; level < plan.levels; ++level)
    if (error == cudaSuccess) error = run_products(plan.level[level], stream);
  if (error == cudaSuccess) error = run_assign(a, stream);
  if (error == cudaSuccess) error = run_aggregate(a, stream);
  if (error == cudaSuccess) error = run_products(plan_late_rows(a, plan), stream);
  if (error == cudaSuccess && a.count > 1) error = run_late(a, stream);
  return error == cudaSuccess ? run_dispatch(a, stream) : error;
}

// x [B, N, C]; projections: per round Wk [C, C], bk [C], Wv [C, C], bv [C], or four of no elements
std::tuple<Tensor, Tensor, Tensor> icm(const Tensor& x, const std::vector<Tensor>& projections,
                                       const Tensor& alpha, const Tensor& beta, const Sizes& grids,
                                       const Sizes& hw, int64_t variant) {
  const CudaScope scope(x);
  const IcmInputs in{x, projections, alpha, beta, grids, hw, variant};
  check_icm(in);
  Call call(x);
  call.add_rounds(in);
  Forward a = args_of(call, true, variant == kPaper);
  a.keys = a.values = view_of(x);
  a.weighted = a.ordered = variant == kReleased;
  const int64_t gates = a.dense ? 1 : in.count();
  a.alpha = call.gate(alpha, gates, "alpha"), a.beta = call.gate(beta, gates, "beta");
  Tensor out = new_like_tokens(x);
  a.out = view_of(out);
  const Kept kept = make_kept(a, x);
  if (a.batch == 0) return {out, kept.labels, kept.saved};
  const int64_t centres = a.batch * a.round[0].centres();
  const bool in_memory = a.projected() && !fuses_keys(a);
  a.square_tiles = a.projected() ? column_tiles(a.channels) : 0;
  a.link_stride = a.dense ? a.at.size : 2 * int64_t{a.round[0].centres()};
  float* composed = nullptr;
  const std::vector<Part> parts{{&a.pooled_values, centres * a.channels},
                                {&a.pooled_squares, centres * a.square_tiles},
                                {&a.token_keys, in_memory ? a.batch * a.round[0].tokens() * a.channels : 0},
                                {&a.links, a.dense ? 0 : a.batch * a.link_stride},
                                {&composed, composition_floats(a.count, a.channels)}};
  const Tensor memory = make_workspace(x, parts);
  if (a.dense) a.links = a.saved + a.at.links;
  STD_CUDA_CHECK(run_icm(a, composed, scope.stream()));
  return {out, kept.labels, kept.saved};
}

}  // namespace
}  // namespace chain
}  // namespace frd

FRD_CHAIN_LIBRARY(m) {
  m.impl("cluster", TORCH_BOX(&frd::chain::cluster));
  m.impl("icm", TORCH_BOX(&frd::chain::icm));
}
