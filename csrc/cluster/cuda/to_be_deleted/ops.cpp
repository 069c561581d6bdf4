// The operators `cluster` and `icm` for CUDA tensors, in one launch each.
#include "cluster/cuda/to_be_deleted/args.h"

#include <climits>
#include <tuple>

#include "cluster/cuda/to_be_deleted/team.h"
#include "cluster/op.h"
#include "core/cuda_device.h"
#include "core/cuda_launch.h"
#include "core/layout.h"

namespace frd {
namespace {

int int_of(int64_t v, const char* what) {
  FRD_CHECK_VALUE(v <= INT_MAX, "frd: ", what, " is too large for CUDA: ", v);
  return static_cast<int>(v);
}

// The labels, the parts of `saved` and the workspace, and the launch.
class Call {
 public:
  // tokens [B, N, C]
  explicit Call(const Tensor& tokens) : tokens_(tokens) {
    args_.dtype = dtype_of(tokens, "tokens");
    args_.batch = tokens.size(0);
    int_of(args_.batch * 8, "the batch");
    int_of(tokens.size(1), "the number of tokens");
    args_.channels = int_of(tokens.size(2), "the number of channels");
  }

  IcmArgs& args() { return args_; }

  // Rounds in order; columns: of the dense dispatch, or 0.
  RoundArgs& add_round(int64_t height, int64_t width, int64_t rows, int64_t columns) {
    FRD_CHECK_VALUE(args_.count < kMaxRounds, "frd: on CUDA an icm has at most ", kMaxRounds, " rounds");
    int_of(rows * columns, "the number of centres");
    RoundArgs& r = args_.round[args_.count++];
    r.height = static_cast<int>(height), r.width = static_cast<int>(width);
    r.rows = static_cast<int>(rows), r.columns = static_cast<int>(columns);
    r.labels = args_.label_stride;
    r.saved = saved_round(args_.saved_stride, r.tokens(), r.centres(), args_.channels,
                          args_.dense ? args_.columns : 0, args_.count == 1);
    args_.label_stride += r.tokens();
    args_.saved_stride = r.saved.end;
    return r;
  }

  // `count` gates of each kind
  void set_gates(const Tensor& alpha, const Tensor& beta, int64_t count) {
    args_.alpha = keep(check_gate(alpha, tokens_, count, "alpha"));
    args_.beta = keep(check_gate(beta, tokens_, count, "beta"));
  }

  const void* keep(const Tensor& t) {
    alive_.push_back(in_layout(t));
    return alive_.back().const_data_ptr();
  }

  // labels [B, sum of N_t], saved [B, L]
  void run(const CudaScope& scope) {
    labels = torch::stable::new_empty(tokens_, Sizes{args_.batch, args_.label_stride}, ScalarType::Int);
    saved = torch::stable::new_empty(tokens_, Sizes{args_.batch, args_.saved_stride}, compute_type(tokens_));
    if (args_.batch == 0) return;
    int team = 0, limit = 0;
    STD_CUDA_CHECK(team_blocks(&team));
    STD_CUDA_CHECK(device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    args_.plan = plan_icm(args_, team, limit);
    args_.workspace_stride = args_.plan.workspace;
    const Tensor workspace = torch::stable::new_empty(
        tokens_, Sizes{args_.batch * args_.plan.team, args_.workspace_stride}, compute_type(tokens_));
    args_.labels = static_cast<int32_t*>(labels.mutable_data_ptr());
    args_.saved = saved.mutable_data_ptr();
    args_.workspace = workspace.mutable_data_ptr();
    STD_CUDA_CHECK(launch(scope.stream()));
  }

  Tensor labels, saved;

 private:
  cudaError_t launch(cudaStream_t stream) const {
    switch (args_.dtype) {
      case DType::f32:
        return icm_f32(args_, stream);
      case DType::f64:
        return icm_f64(args_, stream);
      case DType::f16:
        return icm_f16(args_, stream);
      default:
        return icm_bf16(args_, stream);
    }
  }

  const Tensor& tokens_;
  IcmArgs args_{};
  std::vector<Tensor> alive_;
};

bool same_memory(const TokenView& a, const TokenView& b) {
  return a.data == b.data && a.batch == b.batch && a.token == b.token && a.channel == b.channel;
}

// k, v [B, N, C], mask bool [B, N], alpha and beta [1]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cluster(const Tensor& k, const Tensor& v,
                                                           const std::optional<Tensor>& mask,
                                                           const Tensor& alpha, const Tensor& beta,
                                                           const Sizes& grid, const Sizes& hw,
                                                           int64_t aggregate) {
  const CudaScope scope(k);
  check_cluster(k, v, grid, hw, aggregate);
  const int64_t batch = k.size(0), tokens = k.size(1), centre_count = grid[0] * grid[1];
  Call call(k);
  IcmArgs& a = call.args();
  a.keys = view_of(k), a.values = view_of(v);
  a.shared = same_memory(a.keys, a.values);
  a.weighted = aggregate == 1, a.ordered = true;
  call.set_gates(alpha, beta, 1);
  call.add_round(hw[0], hw[1], grid[0], grid[1]);
  if (mask.has_value()) {
    check_mask(*mask, batch, tokens);
    a.mask = static_cast<const bool*>(mask->const_data_ptr());
    a.mask_batch = mask->stride(0), a.mask_token = mask->stride(1);
  }
  Tensor centres = torch::stable::new_empty(v, Sizes{batch, centre_count, k.size(2)});
  Tensor similarity = torch::stable::new_empty(k, Sizes{batch, tokens}, compute_type(k));
  Tensor counts = torch::stable::new_empty(k, Sizes{batch, centre_count}, ScalarType::Int);
  a.similarity = similarity.mutable_data_ptr();
  a.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  a.centres = view_of(centres);
  call.run(scope);
  return {centres, call.labels, similarity, counts, call.saved};
}

// x [B, N, C]; projections: per round Wk [C, C], bk [C], Wv [C, C], bv [C], or four of no elements
std::tuple<Tensor, Tensor, Tensor> icm(const Tensor& x, const std::vector<Tensor>& projections,
                                       const Tensor& alpha, const Tensor& beta, const Sizes& grids,
                                       const Sizes& hw, int64_t variant) {
  const CudaScope scope(x);
  const IcmInputs in{x, projections, alpha, beta, grids, hw, variant};
  check_icm(in);
  Call call(x);
  IcmArgs& a = call.args();
  a.keys = a.values = view_of(x);
  a.shared = true;
  a.dispatch = true, a.dense = variant == kPaper;
  a.weighted = a.ordered = variant == kReleased;
  a.columns = int_of(grids[grids.size() - 2] * grids[grids.size() - 1], "the number of centres");
  call.set_gates(alpha, beta, a.dense ? 1 : in.count());
  for (int64_t t = 0; t < in.count(); ++t) {
    const int64_t* image = t == 0 ? hw.data() : &grids[2 * t - 2];
    RoundArgs& r = call.add_round(image[0], image[1], grids[2 * t], grids[2 * t + 1]);
    if (!in.projected(t)) continue;
    r.key_weight = call.keep(projections[4 * t]), r.key_bias = call.keep(projections[4 * t + 1]);
    r.value_weight = call.keep(projections[4 * t + 2]), r.value_bias = call.keep(projections[4 * t + 3]);
  }
  Tensor out = new_like_tokens(x);
  a.out = view_of(out);
  call.run(scope);
  return {out, call.labels, call.saved};
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) {
  m.impl("cluster", TORCH_BOX(&frd::cluster));
  m.impl("icm", TORCH_BOX(&frd::icm));
}
