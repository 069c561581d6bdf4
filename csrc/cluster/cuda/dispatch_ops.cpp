// The operator `cluster_dispatch` and its backward for CUDA tensors.
#include "cluster/cuda/dispatch.h"

#include <climits>
#include <tuple>

#include "cluster/op.h"
#include "core/cuda_device.h"
#include "core/cuda_launch.h"
#include "core/layout.h"

namespace frd {
namespace {

// centres [B, O, C]; labels int32 [B, N]; similarity [B, N], both contiguous
ClusterDispatchArgs checked(const Tensor& centres, const Tensor& labels, const Tensor& similarity) {
  check_dispatch(centres, labels, similarity);
  const int64_t batch = centres.size(0), tokens = labels.size(1), channels = centres.size(2);
  FRD_CHECK_VALUE(batch * tokens <= INT_MAX &&
                      batch * centres.size(1) * ((channels + 255) / 256) <= INT_MAX && channels <= INT_MAX,
                  "frd: too many tokens or centres for CUDA");
  ClusterDispatchArgs a{};
  a.batch = batch;
  a.tokens = static_cast<int>(tokens), a.channels = static_cast<int>(channels);
  a.count = static_cast<int>(centres.size(1));
  a.centres = view_of(centres);
  a.labels = static_cast<const int32_t*>(labels.const_data_ptr());
  a.similarity = similarity.const_data_ptr();
  return a;
}

Tensor dispatch(const Tensor& centres, const Tensor& labels_, const Tensor& similarity_,
                bool channels_first) {
  const CudaScope scope(centres);
  const Tensor labels = in_layout(labels_), similarity = in_layout(similarity_);
  ClusterDispatchArgs a = checked(centres, labels, similarity);
  Tensor out = new_tokens(centres, a.batch, a.tokens, a.channels, channels_first);
  a.out = view_of(out);
  if (a.batch > 0) STD_CUDA_CHECK(cluster_dispatch(a, scope.stream()));
  return out;
}

// grad [B, N, C] -> of centres [B, O, C], of similarity [B, N]
std::tuple<Tensor, Tensor> dispatch_backward(const Tensor& grad, const Tensor& centres, const Tensor& labels_,
                                             const Tensor& similarity_) {
  const CudaScope scope(centres);
  const Tensor labels = in_layout(labels_), similarity = in_layout(similarity_);
  ClusterDispatchArgs a = checked(centres, labels, similarity);
  FRD_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == a.batch && grad.size(1) == a.tokens &&
                      grad.size(2) == a.channels && grad.scalar_type() == centres.scalar_type(),
                  "frd: grad must be [B, N, C] in the dtype of centres");
  Tensor centres_grad = torch::stable::new_empty(centres, Sizes{a.batch, a.count, a.channels});
  Tensor similarity_grad = torch::stable::new_empty(similarity, Sizes{a.batch, a.tokens});
  if (a.batch == 0) return {centres_grad, similarity_grad};
  a.chunks = dispatch_chunks(a.tokens, a.count);
  const Tensor sums = torch::stable::new_empty(
      similarity, Sizes{a.batch, a.chunks, static_cast<int64_t>(a.count) * a.channels});
  a.grad = view_of(grad), a.centres_grad = view_of(centres_grad);
  a.similarity_grad = similarity_grad.mutable_data_ptr();
  a.sums = sums.mutable_data_ptr();
  int limit = 0;
  STD_CUDA_CHECK(device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  STD_CUDA_CHECK(cluster_dispatch_backward(a, limit, scope.stream()));
  return {centres_grad, similarity_grad};
}

}  // namespace
}  // namespace frd

FRD_CUDA_LIBRARY(m) {
  m.impl("cluster_dispatch", TORCH_BOX(&frd::dispatch));
  m.impl("cluster_dispatch_backward", TORCH_BOX(&frd::dispatch_backward));
}

FRD_CHAIN_LIBRARY(m) {
  m.impl("cluster_dispatch", TORCH_BOX(&frd::dispatch));
  m.impl("cluster_dispatch_backward", TORCH_BOX(&frd::dispatch_backward));
}
