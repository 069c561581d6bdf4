// Every token's own centre times its similarity.
#include <tuple>

#include "cluster/cpu/kernels.h"
#include "cluster/cpu/launch.h"
#include "core/layout.h"

namespace frd {
namespace {

const ClusterDispatchOps<float>& cluster_dispatch_ops(float) { return cluster_dispatch_kernels().f32; }
const ClusterDispatchOps<double>& cluster_dispatch_ops(double) { return cluster_dispatch_kernels().f64; }

// labels [B, N], contiguous: they index memory
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

// The arguments of both directions; the tensors in `alive` must outlive them.
template <class A>
ClusterDispatch<A> make(const Tensor& centres, const Tensor& labels, const Tensor& similarity,
                        std::vector<Tensor>& alive) {
  alive = {in_layout(labels), in_layout(similarity)};
  ClusterDispatch<A> d{};
  d.batch = centres.size(0);
  d.tokens = labels.size(1);
  d.channels = centres.size(2);
  d.centres = centres.size(1);
  check_range(alive[0], d.centres);
  d.rows = view_of(centres);
  d.labels = {static_cast<int32_t*>(const_cast<void*>(alive[0].const_data_ptr())), d.tokens};
  d.similarity = {const_cast<A*>(alive[1].const_data_ptr<A>()), d.tokens};
  return d;
}

template <class A>
Tensor forward(const Tensor& centres, const Tensor& labels, const Tensor& similarity, bool channels_first) {
  std::vector<Tensor> alive;
  ClusterDispatch<A> d = make<A>(centres, labels, similarity, alive);
  Tensor out = new_tokens(centres, d.batch, d.tokens, d.channels, channels_first);
  d.out = view_of(out);
  d.chunks = chunk_count(d.tokens, 1);
  for_units(d.batch * d.chunks,
            [&](int64_t begin, int64_t end) { cluster_dispatch_ops(A()).forward(d, begin, end); });
  return out;
}

// grad [B, N, C]
template <class A>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& centres, const Tensor& labels,
                                    const Tensor& similarity) {
  std::vector<Tensor> alive;
  ClusterDispatch<A> d = make<A>(centres, labels, similarity, alive);
  Tensor rows_grad = torch::stable::new_empty(centres, Sizes{d.batch, d.centres, d.channels});
  Tensor similarity_grad = torch::stable::new_empty(similarity, Sizes{d.batch, d.tokens});
  d.grad = view_of(grad);
  d.rows_grad = view_of(rows_grad);
  d.similarity_grad = {similarity_grad.mutable_data_ptr<A>(), d.tokens};
  d.chunks = chunk_count(d.tokens, d.centres);
  Tensor workspace = allocate<A>(
      centres, d.batch, [&](Arena<A>& arena) { d.sums = arena.take(d.chunks * d.centres * d.channels); });
  const ClusterDispatchOps<A>& ops = cluster_dispatch_ops(A());
  const auto stage = [&](typename ClusterDispatchOps<A>::Stage run, int64_t units) {
    for_units(units, [&](int64_t begin, int64_t end) { run(d, begin, end); });
  };
  stage(ops.sum, d.batch * d.chunks);
  stage(ops.rows_grad, d.batch * d.blocks());
  return {rows_grad, similarity_grad};
}

Tensor cluster_dispatch(const Tensor& centres, const Tensor& labels, const Tensor& similarity,
                        bool channels_first) {
  check_dispatch(centres, labels, similarity);
  const auto run = compute_type(centres) == ScalarType::Double ? forward<double> : forward<float>;
  return run(centres, labels, similarity, channels_first);
}

std::tuple<Tensor, Tensor> cluster_dispatch_backward(const Tensor& grad, const Tensor& centres,
                                                     const Tensor& labels, const Tensor& similarity) {
  check_dispatch(centres, labels, similarity);
  FRD_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == labels.size(0) && grad.size(1) == labels.size(1) &&
                      grad.size(2) == centres.size(2) && grad.scalar_type() == centres.scalar_type(),
                  "frd: grad must be [B, N, C] in the dtype of centres");
  const auto run = compute_type(centres) == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad, centres, labels, similarity);
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("cluster_dispatch", TORCH_BOX(&frd::cluster_dispatch));
  m.impl("cluster_dispatch_backward", TORCH_BOX(&frd::cluster_dispatch_backward));
}
