// Schemas of all operators: the table of contents of the native code.
// kind: 0 vanilla, 1 central, 2 angular, 3 radial (frd_kernels/pdc/kinds.py). Strings never cross the
// boundary: the stable ABI of torch 2.11 and 2.13 leaks each `str` argument.
#include "core/stable.h"

STABLE_TORCH_LIBRARY(frd, m) {
  // Pixel difference convolution. weight [O, I, 3, 3] -> [O, I, 3, 3], or [O, I, 5, 5] for radial.
  m.def("pdc_weight(Tensor weight, int kind, float theta, ScalarType dtype) -> Tensor");
  m.def("pdc_weight_backward(Tensor grad, int kind, float theta, ScalarType dtype) -> Tensor");
  m.def(
      "pdc2d_depthwise(Tensor x, Tensor weight, Tensor? bias, int kind, float theta, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor");
  m.def(
      "pdc2d_depthwise_backward(Tensor grad, Tensor x, Tensor weight, int kind, float theta, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool need_dx, bool need_dw) -> (Tensor, Tensor, "
      "Tensor)");

  // Depthwise PDC -> ReLU -> 1x1 -> + residual.
  m.def(
      "pdc_block(Tensor x, Tensor pdc_weight, Tensor? pdc_bias, Tensor point_weight, Tensor? point_bias, "
      "Tensor? residual, int kind, float theta, SymInt[] stride, SymInt[] dilation) -> Tensor");
  m.def(
      "pdc_block_backward(Tensor grad, Tensor x, Tensor pdc_weight, Tensor? pdc_bias, Tensor point_weight, "
      "int kind, float theta, SymInt[] stride, SymInt[] dilation, bool need_point_bias) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");

  // Cosine clustering of tokens [B, N, C]. aggregate: 0 count, 1 similarity. variant: 0 paper, 1 released.
  // mask: bool [B, N], the tokens that take part. labels: int32 [B, N], -1 for the others. saved: for the
  // backward pass, in float32 (float64 for float64).
  m.def(
      "cluster(Tensor k, Tensor v, Tensor? mask, Tensor alpha, Tensor beta, SymInt[] grid, SymInt[] hw, "
      "int aggregate) -> (Tensor centres, Tensor labels, Tensor similarity, Tensor counts, Tensor saved)");
  m.def(
      "cluster_backward(Tensor grad_centres, Tensor grad_similarity, Tensor k, Tensor v, Tensor alpha, "
      "Tensor beta, Tensor labels, Tensor saved, SymInt[] grid, SymInt[] hw, int aggregate) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Each token's own centre times its similarity [B, N, C]; channels_first: in memory [B, C, N].
  m.def("cluster_dispatch(Tensor centres, Tensor labels, Tensor similarity, bool channels_first) -> Tensor");
  m.def(
      "cluster_dispatch_backward(Tensor grad, Tensor centres, Tensor labels, Tensor similarity) "
      "-> (Tensor grad_centres, Tensor grad_similarity)");
  m.def(
      "icm(Tensor x, Tensor[] projections, Tensor alpha, Tensor beta, SymInt[] grids, SymInt[] hw, "
      "int variant) -> (Tensor out, Tensor labels, Tensor saved)");
  m.def(
      "icm_backward(Tensor grad, Tensor x, Tensor[] projections, Tensor alpha, Tensor beta, Tensor labels, "
      "Tensor saved, SymInt[] grids, SymInt[] hw, int variant) -> (Tensor, Tensor[], Tensor, Tensor)");
}
