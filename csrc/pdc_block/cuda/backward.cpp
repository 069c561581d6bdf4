// The backward CUDA operator of the fused block. The gradients of the 1x1 convolution are products of the
// library. Between them the forward's stencil kernel computes the hidden values again, with their ReLU, and
// gates the gradient behind it in place, so that nothing is kept from the forward pass. In channels_last
// these are five launches: product, stencil, product, the stencil's backward and its ordered sum. In NCHW the
// second product is one for each image, and their sum is one or two launches more.
//
// cuBLAS gives equal bits from run to run on one GPU, as torch gives each stream a workspace of its own. But
// it orders sums by the sizes, so that the gradient of a sample may depend on its batch in the last bit. TF32
// and sums in 16 bit are torch's settings (torch.backends.cuda.matmul).
#include "core/cuda_launch.h"
#include "pdc/cuda/problem.h"
#include "pdc_block/cuda/op.h"

namespace frd {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// A view [n, rows, columns] of t, from its first element on.
Tensor matrices(const Tensor& t, const Ints& sizes, const Ints& strides) {
  std::array<StableIValue, 4> stack{from(t), from(sizes), from(strides), from(std::optional<int64_t>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::as_strided", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// Images [B, channels, H, W], dense in their layout, as matrices [n, channels, pixels]: in channels_last one
// of all images, in NCHW one for each.
Tensor planes_of(const PdcBlockGeometry& g, const Tensor& images, int64_t channels) {
  const int64_t pixels = g.out_height * g.out_width;
  if (g.channels_last) return matrices(images, {1, channels, g.batch * pixels}, {0, 1, channels});
  return matrices(images, {g.batch, channels, pixels}, {channels * pixels, pixels, 1});
}

// out [n, r, c] = a [n, r, k] b [n, k, c] by the library. With `out` given autocast casts nothing.
void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

// The same to float32, from a and b of 16 bit.
void multiply_wide(const Tensor& a, const Tensor& b, Tensor& out) {
#if defined(FRD_EMULATED)
  // On a CPU torch has no such product.
  multiply(in_type(a, ScalarType::Float), in_type(b, ScalarType::Float), out);
#else
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
#endif
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 1, 2); }

// The gradient [B, C, Ho, Wo] of the hidden values: point^T grad at every pixel. grad [B, Co, Ho, Wo],
// point_weight [Co, C, 1, 1]
Tensor hidden_gradient(const PdcBlockGeometry& g, const Tensor& grad, const Tensor& point_weight) {
  Tensor out = empty_images(grad, g.channels, g.out_height, g.out_width, format_of(g));
  const Tensor from_grad = planes_of(g, grad, g.out_channels);
  Tensor to_hidden = planes_of(g, out, g.channels);
  const Ints sizes{from_grad.size(0), g.channels, g.out_channels};
  const Tensor point = matrices(in_layout(point_weight), sizes, {0, 1, g.channels});
  if (g.channels_last) {
    // The library writes rows of contiguous channels.
    Tensor rows = transposed(to_hidden);
    multiply(transposed(from_grad), transposed(point), rows);
  } else {
    multiply(point, from_grad, to_hidden);
  }
  return out;
}

// d_point [Co, C, 1, 1]: the sum of grad hidden^T over all pixels. grad [B, Co, Ho, Wo], hidden [B, C, Ho,
// Wo]
Tensor point_gradient(const PdcBlockGeometry& g, const Tensor& grad, const Tensor& hidden) {
  const Tensor left = planes_of(g, grad, g.out_channels);
  const Tensor right = transposed(planes_of(g, hidden, g.channels));
  const Ints sizes{left.size(0), g.out_channels, g.channels};
  const Ints shape{g.out_channels, g.channels, 1, 1};
  // In NCHW a product for each image. In float, so that the sum over all pixels is rounded once.
  Tensor products = torch::stable::new_empty(grad, sizes, ScalarType::Float);
  g.dtype == DType::f32 ? multiply(left, right, products) : multiply_wide(left, right, products);
  const std::array<int64_t, 1> images{0};
  if (sizes[0] > 1) products = torch::stable::sum(products, images);
  return torch::stable::reshape(in_type(products, grad.scalar_type()), shape);
}

// relu(stencil(x)) [B, C, Ho, Wo]; `gated`, its gradient, becomes that of the stencil. x [B, C, H, W],
// pdc_weight [C, 1, 3, 3], pdc_bias [C]
Tensor hidden_again(const PdcBlockGeometry& g, const Tensor& x, const Tensor& pdc_weight,
                    const OptionalTensor& pdc_bias, int64_t kind, const Ints& stride, const Ints& dilation,
                    Tensor& gated, cudaStream_t stream) {
  const PdcGeometry stencil = checked_pdc(x, pdc_weight, pdc_bias, kind, g.theta, stride, dilation, dilation);
  const Tensor weight = in_layout(pdc_weight);
  const OptionalTensor bias = pdc_bias ? OptionalTensor(in_layout(*pdc_bias)) : std::nullopt;
  Tensor out = empty_images(x, g.channels, g.out_height, g.out_width, format_of(g));
  PdcProblem p = problem_of(stencil, x, weight, format_of(g));
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.gated = gated.mutable_data_ptr();
  STD_CUDA_CHECK(pdc_forward_cuda(p, stream));
  return out;
}

// grad [B, Co, Ho, Wo], x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1] ->
// dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1], d_point_bias [Co] or, if not
// needed, [0]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pdc_block_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
    const Tensor& point_weight, int64_t kind, double theta, const Ints& stride, const Ints& dilation,
    bool need_point_bias) {
  const CudaScope scope(x_);
  const PdcBlockGeometry g = checked(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  const Tensor x = in_layout(x_, format_of(g));
  const Tensor grad = checked_images(g, "grad", grad_, x, g.out_channels);
  Tensor d_point_bias = torch::stable::new_empty(x, {need_point_bias ? g.out_channels : 0});
  Tensor hidden_grad, d_point;
  if (g.batch == 0) {
    d_point = torch::stable::new_zeros(x, {g.out_channels, g.channels, 1, 1});
    torch::stable::zero_(d_point_bias);
    hidden_grad = empty_images(x, g.channels, g.out_height, g.out_width, format_of(g));
  } else {
    hidden_grad = hidden_gradient(g, grad, point_weight);
    const Tensor hidden =
        hidden_again(g, x, pdc_weight, pdc_bias, kind, stride, dilation, hidden_grad, scope.stream());
    d_point = point_gradient(g, grad, hidden);
    const std::array<int64_t, 3> pixels{0, 2, 3};
    if (need_point_bias) torch::stable::sum_out(d_point_bias, grad, pixels);
  }
  auto [dx, d_pdc, d_pdc_bias] =
      pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, kind, theta, stride, dilation, dilation);
  return {dx, d_pdc, d_pdc_bias, d_point, d_point_bias};
}

}  // namespace
}  // namespace frd

FRD_CHAIN_LIBRARY(m) { m.impl("pdc_block_backward", TORCH_BOX(&frd::pdc_block_backward)); }
