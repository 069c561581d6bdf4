// Argument checks, geometry and allocation of the pixel difference convolution and its weight transform,
// shared by the CPU and CUDA operators.
#pragma once
#include "core/layout.h"
#include "core/stable.h"
#include "pdc/weight.h"

namespace frd {

using Ints = std::vector<int64_t>;

// The forward convolution along both axes.
struct PdcGeometry {
  PdcKind kind;
  double theta;
  PdcAxis y, x;
};

// Radial's outer taps reach one dilation step beyond the 3x3 window that `padding` counts for.
inline PdcAxis checked_axis(const char* name, PdcKind kind, int64_t size, int64_t stride, int64_t padding,
                            int64_t dilation) {
  FRD_CHECK_VALUE(stride >= 1 && dilation >= 1, "pdc2d: stride and dilation must be at least 1, got ", stride,
                  " and ", dilation);
  const int64_t extra = kind == PdcKind::radial ? dilation : 0;
  FRD_CHECK_VALUE(padding >= -extra, "pdc2d: padding must be at least ", -extra, ", got ", padding);
  const int64_t covered = size + 2 * padding - 2 * dilation - 1;
  FRD_CHECK_VALUE(covered >= 0, "pdc2d: the output would be empty: ", name, " ", size, ", padding ", padding,
                  ", dilation ", dilation);
  return {size, covered / stride + 1, padding + extra, stride, 1, dilation};
}

// x [B, C, H, W], weight [C, 1, 3, 3], bias [C]
inline PdcGeometry checked_pdc(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               int64_t kind, double theta, const Ints& stride, const Ints& padding,
                               const Ints& dilation) {
  FRD_CHECK_VALUE(kind >= 0 && kind <= 3, "pdc2d: kind must be 0 (vanilla) to 3 (radial), got ", kind);
  FRD_CHECK_VALUE(x.dim() == 4, "pdc2d: x must be [B, C, H, W], got ", x.dim(), "-D");
  const bool shaped = weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                      weight.size(2) == 3 && weight.size(3) == 3;
  FRD_CHECK_VALUE(shaped, "pdc2d: depthwise weight must be [", x.size(1), ", 1, 3, 3], got ", weight.dim(),
                  "-D with first size ", weight.dim() ? weight.size(0) : 0);
  FRD_CHECK_VALUE(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                  "pdc2d: weight must have the dtype and device of x");
  if (bias) {
    FRD_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == x.size(1), "pdc2d: bias must be [", x.size(1), "]");
    FRD_CHECK_VALUE(bias->scalar_type() == x.scalar_type() && bias->device() == x.device(),
                    "pdc2d: bias must have the dtype and device of x");
  }
  FRD_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "pdc2d: stride, padding and dilation must be pairs");
  const auto k = static_cast<PdcKind>(kind);
  return {k, theta, checked_axis("height", k, x.size(2), stride[0], padding[0], dilation[0]),
          checked_axis("width", k, x.size(3), stride[1], padding[1], dilation[1])};
}

// grad [B, C, Ho, Wo], x [B, C, H, W]
inline void check_pdc_grad(const PdcGeometry& g, const Tensor& grad, const Tensor& x) {
  const bool shaped = grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == g.y.out && grad.size(3) == g.x.out;
  FRD_CHECK_VALUE(shaped && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                  "pdc2d: grad must have the shape of the output, [", x.size(0), ", ", x.size(1), ", ",
                  g.y.out, ", ", g.x.out, "], and the dtype and device of x");
}

// The CUDA kernels index the elements of an image [C, H, W] with 32 bits.
inline void check_image_size(const char* op, const char* name, int64_t channels, int64_t height,
                             int64_t width) {
  constexpr int64_t kMax = (int64_t{1} << 31) - 1;
  const bool fits = channels == 0 || height == 0 || width == 0 ||
                    (channels <= kMax / height && channels * height <= kMax / width);
  FRD_CHECK_VALUE(fits, op, ": ", name, " must have fewer than 2^31 elements per image, got ", channels,
                  " x ", height, " x ", width);
}

// A checked call of the weight transform; args points into the tensors.
struct PdcWeightLaunch {
  Tensor in, out;
  PdcWeightArgs args;
  int64_t pairs;
};

inline PdcKind checked_kind(int64_t kind) {
  FRD_CHECK_VALUE(kind >= 0 && kind <= 3, "frd: kind must be 0 (vanilla) to 3 (radial), got ", kind);
  return static_cast<PdcKind>(kind);
}

// tensor: weight [O, I, 3, 3], or if transposed the gradient of the plain kernel [O, I, side, side]
inline PdcWeightLaunch prepare_pdc_weight(const Tensor& tensor, int64_t kind_, double theta, ScalarType dtype,
                                          bool transposed) {
  const PdcKind kind = checked_kind(kind_);
  const int64_t side = kernel_side(kind);
  const int64_t in_side = transposed ? side : 3;
  const int64_t out_side = transposed ? 3 : side;
  FRD_CHECK_VALUE(tensor.dim() == 4 && tensor.size(2) == in_side && tensor.size(3) == in_side,
                  "frd: ", transposed ? "grad" : "weight", " must be [O, I, ", in_side, ", ", in_side,
                  "], got ", tensor.dim(), "-D with last size ",
                  tensor.dim() ? tensor.size(tensor.dim() - 1) : 0);
  Tensor in = in_layout(tensor);
  Tensor out = torch::stable::new_empty(in, {in.size(0), in.size(1), out_side, out_side}, dtype);
  PdcWeightArgs args{in.const_data_ptr(),
                     out.mutable_data_ptr(),
                     dtype_of(in, "weight"),
                     dtype_of(out, "dtype"),
                     kind,
                     theta};
  return {in, out, args, in.size(0) * in.size(1)};
}

}  // namespace frd
