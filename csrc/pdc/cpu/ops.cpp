// CPU operators of the pixel difference convolution: memory, threads and registration.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "core/layout.h"
#include "pdc/cpu/kernel.h"
#include "pdc/op.h"
#include "pdc/taps.h"
#include "pdc/weight.h"

namespace frd {
namespace {

// Outputs that a thread should have at least.
constexpr int64_t kMinOutputsPerThread = 32768;
// Outputs of a run of rows in channels_last; more in the backward, where a run leaves 10 sums per channel.
constexpr int64_t kForwardRunOutputs = 16384;
constexpr int64_t kBackwardRunOutputs = 65536;
// Outputs after which dx follows dw in NCHW, so that it finds their dy in the second-level cache.
constexpr int64_t kBlockOutputs = 32768;
// Lanes of the widest vector.
constexpr int64_t kPitchUnit = 16;

// The forward stencil. x [B, C, H, W]
PdcStencil forward_stencil(const PdcGeometry& g, const Tensor& x) {
  PdcStencil s{};
  s.y = g.y;
  s.x = g.x;
  s.batch = x.size(0);
  s.channels = x.size(1);
  s.pitch = (s.channels + kPitchUnit - 1) / kPitchUnit * kPitchUnit;
  s.kind = g.kind;
  s.theta = g.theta;
  s.pure = g.theta == 1;
  s.dtype = dtype_of(x, "x");
  return s;
}

// The stencil over dy that gives dx: plain with the transformed weight for the 3x3 kinds, while radial stays
// a sum of differences.
PdcStencil input_grad_stencil(const PdcStencil& forward) {
  PdcStencil s = forward;
  s.y = input_grad_axis(forward.y, forward.kind);
  s.x = input_grad_axis(forward.x, forward.kind);
  if (forward.kind != PdcKind::radial) {
    s.kind = PdcKind::vanilla;
    s.pure = true;
  }
  return s;
}

// weight [C, 1, 3, 3], bias [C] -> [10, pitch] in the compute type; for_input_grad: the weights of
// input_grad_stencil().
Tensor pack_weight(const PdcStencil& s, const Tensor& weight_, const std::optional<Tensor>& bias_,
                   bool for_input_grad) {
  const Tensor weight = in_layout(weight_);
  const std::optional<Tensor> bias = bias_ ? std::optional(in_layout(*bias_)) : std::nullopt;
  const ScalarType compute = s.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor packed = torch::stable::new_zeros(weight, {kPdcRows, s.pitch}, compute);
  with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const T* weights = static_cast<const T*>(weight.const_data_ptr());
    const T* biases = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    A* out = static_cast<A*>(packed.mutable_data_ptr());
    for (int64_t c = 0; c < s.channels; ++c) {
      A w[kPdcWeights];
      for (int k = 0; k < kPdcWeights; ++k) w[k] = load(weights[c * kPdcWeights + k]);
      if (for_input_grad)
        with_kind(s.kind,
                  [&](auto kind) { input_grad_weights<decltype(kind)::value>(w, static_cast<A>(s.theta)); });
      for (int k = 0; k < kPdcWeights; ++k) out[k * s.pitch + c] = w[k];
      if (biases) out[kPdcWeights * s.pitch + c] = load(biases[c]);
    }
  });
  return packed;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Zeroed memory, aligned to a cache line; get() is null if the allocation failed.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : block_(std::calloc(bytes + 64, 1)) {}
  void* get() const {
    return block_ ? reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block_.get()) + 63) / 64 * 64)
                  : nullptr;
  }

 private:
  std::unique_ptr<void, Free> block_;
};

int64_t compute_size(const PdcStencil& s) { return s.dtype == DType::f64 ? 8 : 4; }
int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }

// NCHW: runs weight_grad and then stencil (either may be null) over `strips` strips of every plane.
void run_nchw(const PdcStencil* weight_grad, const PdcStencil* stencil, int64_t strips) {
  const PdcKernels& kernels = pdc_kernels();
  const PdcStencil& any = stencil ? *stencil : *weight_grad;
  const int64_t weight_grad_bytes =
      weight_grad ? kernels.strip_elements(*weight_grad, strips) * compute_size(any) : 0;
  const int64_t stencil_bytes = stencil ? kernels.strip_elements(*stencil, strips) * compute_size(any) : 0;
  const int64_t outputs = at_least_one(any.y.out * any.x.out / strips);
  const int64_t block = at_least_one(kBlockOutputs / outputs);
  std::atomic<bool> failed{false};
  const auto run_strips = [&](int64_t begin, int64_t end) {
    const Scratch weight_grad_scratch(weight_grad_bytes);
    const Scratch stencil_scratch(stencil_bytes);
    // Nothing may be thrown inside a parallel loop.
    if (!weight_grad_scratch.get() || !stencil_scratch.get()) {
      failed = true;
      return;
    }
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = first + block < end ? first + block : end;
      if (weight_grad)
        kernels.weight_grad_strips(*weight_grad, weight_grad_scratch.get(), strips, first, last);
      if (stencil) kernels.stencil_strips(*stencil, stencil_scratch.get(), strips, first, last);
    }
  };
  torch::stable::parallel_for(0, any.batch * any.channels * strips,
                              at_least_one(kMinOutputsPerThread / outputs), run_strips);
  STD_TORCH_CHECK(!failed, "pdc2d: no memory for a scratch of ", weight_grad_bytes + stencil_bytes, " bytes");
}

// channels_last: the same over `runs` runs of rows of every image.
void run_channels_last(const PdcStencil* weight_grad, const PdcStencil* stencil, int64_t runs) {
  const PdcKernels& kernels = pdc_kernels();
  const PdcStencil& any = stencil ? *stencil : *weight_grad;
  const std::vector<char> zeros(any.channels * compute_size(any), 0);
  const int64_t outputs = at_least_one(any.y.out * any.x.out * any.channels / runs);
  const auto run_rows = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t image = part / runs;
      const int64_t run = part % runs;
      if (weight_grad) {
        const int64_t rows = weight_grad->y.out;
        kernels.weight_grad_rows(*weight_grad, zeros.data(), image, rows * run / runs,
                                 rows * (run + 1) / runs, part);
      }
      if (stencil) {
        const int64_t rows = stencil->y.out;
        kernels.stencil_rows(*stencil, zeros.data(), image, rows * run / runs, rows * (run + 1) / runs);
      }
    }
  };
  torch::stable::parallel_for(0, any.batch * runs, at_least_one(kMinOutputsPerThread / outputs), run_rows);
}

// x [B, C, H, W], weight [C, 1, 3, 3], bias [C] -> y [B, C, Ho, Wo]
Tensor pdc2d_depthwise(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias,
                       int64_t kind, double theta, const Ints& stride, const Ints& padding,
                       const Ints& dilation) {
  const PdcGeometry g = checked_pdc(x_, weight, bias, kind, theta, stride, padding, dilation);
  const MemoryFormat format = layout_of(x_);
  const Tensor x = in_layout(x_, format);
  PdcStencil s = forward_stencil(g, x);
  Tensor y = empty_images(x, s.channels, s.y.out, s.x.out, format);
  if (s.batch == 0 || s.channels == 0) return y;
  const Tensor packed = pack_weight(s, weight, bias, false);
  s.source = x.const_data_ptr();
  s.weights = packed.const_data_ptr();
  s.out = y.mutable_data_ptr();
  if (format == MemoryFormat::ChannelsLast) {
    const int64_t rows = at_least_one(kForwardRunOutputs / (s.x.out * s.channels));
    run_channels_last(nullptr, &s, (s.y.out + rows - 1) / rows);
  } else {
    run_nchw(nullptr, &s, pdc_kernels().strips(s));
  }
  return y;
}

// sums: NCHW [B, C, parts, 10], channels_last [B * parts, 10, pitch] -> dw [C, 1, 3, 3], db [C]. Adds the
// parts in ascending order, so that the result does not depend on the threads.
void reduce_weight_grad(const PdcStencil& s, const Tensor& sums, int64_t parts, bool channels_last,
                        Tensor& dw, Tensor& db) {
  with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const A* part = static_cast<const A*>(sums.const_data_ptr());
    T* weights = static_cast<T*>(dw.mutable_data_ptr());
    T* biases = static_cast<T*>(db.mutable_data_ptr());
    std::vector<A> total(kPdcRows * s.pitch, A(0));
    if (channels_last) {
      for (int64_t i = 0; i < s.batch * parts; ++i, part += kPdcRows * s.pitch) {
        for (int64_t j = 0; j < kPdcRows * s.pitch; ++j) total[j] += part[j];
      }
    } else {
      for (int64_t i = 0; i < s.batch * s.channels * parts; ++i, part += kPdcRows) {
        const int64_t c = i / parts % s.channels;
        for (int k = 0; k < kPdcRows; ++k) total[k * s.pitch + c] += part[k];
      }
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int k = 0; k < kPdcWeights; ++k) store(weights[c * kPdcWeights + k], total[k * s.pitch + c]);
      store(biases[c], total[kPdcWeights * s.pitch + c]);
    }
  });
}

// Strips of a plane, or in channels_last runs of an image, that both passes of the backward are cut into: no
// more than the rows of either.
int64_t backward_parts(const PdcStencil& weight_grad, const PdcStencil& input_grad, bool need_dx,
                       bool channels_last) {
  const int64_t rows = std::min(weight_grad.y.out, input_grad.y.out);
  int64_t parts;
  if (channels_last) {
    parts = weight_grad.y.out * weight_grad.x.out * weight_grad.channels / kBackwardRunOutputs;
  } else {
    const bool has_rows = need_dx && input_grad.y.out;
    parts = std::max(pdc_kernels().strips(weight_grad), has_rows ? pdc_kernels().strips(input_grad) : 1);
  }
  return at_least_one(std::min(parts, rows));
}

// grad [B, C, Ho, Wo], x [B, C, H, W], weight [C, 1, 3, 3] -> dx [B, C, H, W], dw [C, 1, 3, 3], db [C]; each
// that is not needed is [0]
std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad_, const Tensor& x_,
                                                            const Tensor& weight, int64_t kind, double theta,
                                                            const Ints& stride, const Ints& padding,
                                                            const Ints& dilation, bool need_dx,
                                                            bool need_dw) {
  const PdcGeometry g = checked_pdc(x_, weight, std::nullopt, kind, theta, stride, padding, dilation);
  check_pdc_grad(g, grad_, x_);
  const MemoryFormat format = layout_of(x_);
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const Tensor x = in_layout(x_, format);
  const Tensor grad = in_layout(grad_, format);
  PdcStencil weight_grad = forward_stencil(g, x);
  PdcStencil input_grad = input_grad_stencil(weight_grad);
  const int64_t channels = weight_grad.channels;
  Tensor dx = need_dx ? empty_images(x, channels, g.y.in, g.x.in, format) : torch::stable::new_empty(x, {0});
  Tensor dw =
      need_dw ? torch::stable::new_zeros(weight, {channels, 1, 3, 3}) : torch::stable::new_empty(weight, {0});
  Tensor db = torch::stable::new_zeros(weight, {need_dw ? channels : 0});
  if (weight_grad.batch == 0 || channels == 0 || !(need_dx || need_dw)) return {dx, dw, db};

  const Tensor packed = pack_weight(weight_grad, weight, std::nullopt, true);
  input_grad.source = grad.const_data_ptr();
  input_grad.weights = packed.const_data_ptr();
  input_grad.out = dx.mutable_data_ptr();
  weight_grad.source = x.const_data_ptr();
  weight_grad.grad = grad.const_data_ptr();
  const int64_t parts = backward_parts(weight_grad, input_grad, need_dx, channels_last);
  Tensor sums = dw;
  if (need_dw) {
    const int64_t width = channels_last ? weight_grad.pitch : channels;
    sums = torch::stable::new_zeros(packed, {weight_grad.batch, parts, width, kPdcRows});
    weight_grad.sums = sums.mutable_data_ptr();
  }
  const auto run = channels_last ? run_channels_last : run_nchw;
  run(need_dw ? &weight_grad : nullptr, need_dx ? &input_grad : nullptr, parts);
  if (need_dw) reduce_weight_grad(weight_grad, sums, parts, channels_last, dw, db);
  return {dx, dw, db};
}

// Pairs of channels that a thread transforms at least.
constexpr int64_t kPairsPerTask = 4096;

// weight [O, I, 3, 3] -> [O, I, side, side]
Tensor pdc_weight(const Tensor& weight, int64_t kind, double theta, ScalarType dtype) {
  PdcWeightLaunch launch = prepare_pdc_weight(weight, kind, theta, dtype, false);
  torch::stable::parallel_for(0, launch.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    pdc_weight_kernels().forward(launch.args, begin, end);
  });
  return launch.out;
}

// grad [O, I, side, side] -> [O, I, 3, 3]
Tensor pdc_weight_backward(const Tensor& grad, int64_t kind, double theta, ScalarType dtype) {
  PdcWeightLaunch launch = prepare_pdc_weight(grad, kind, theta, dtype, true);
  torch::stable::parallel_for(0, launch.pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    pdc_weight_kernels().transposed(launch.args, begin, end);
  });
  return launch.out;
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("pdc2d_depthwise", TORCH_BOX(&frd::pdc2d_depthwise));
  m.impl("pdc2d_depthwise_backward", TORCH_BOX(&frd::pdc2d_depthwise_backward));
  m.impl("pdc_weight", TORCH_BOX(&frd::pdc_weight));
  m.impl("pdc_weight_backward", TORCH_BOX(&frd::pdc_weight_backward));
}
