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

constexpr int64_t kGrain = 32768;         // outputs a thread should at least have
constexpr int64_t kRunOutputs = 16384;    // of an item in channels_last
constexpr int64_t kSumOutputs = 65536;    // likewise where it leaves 10 sums for each channel
constexpr int64_t kBlockOutputs = 32768;  // planes whose dy is still in the second cache when dx follows dw
constexpr int64_t kPitchUnit = 16;        // lanes of the widest vector

PdcStencil stencil(const PdcGeometry& g, const Tensor& x) {
  PdcStencil s{};
  s.y = g.y, s.x = g.x;
  s.batch = x.size(0), s.channels = x.size(1);
  s.pitch = (s.channels + kPitchUnit - 1) / kPitchUnit * kPitchUnit;
  s.kind = g.kind, s.theta = g.theta, s.pure = g.theta == 1;
  s.dtype = dtype_of(x, "x");
  return s;
}

// The gradient of x: for the 3x3 kinds a plain stencil with the transformed weight; radial stays a sum of
// differences.
PdcStencil turned(const PdcStencil& s) {
  PdcStencil t = s;
  t.y = turned(s.y, s.kind), t.x = turned(s.x, s.kind);
  if (s.kind != PdcKind::radial) t.kind = PdcKind::vanilla, t.pure = true;
  return t;
}

// weight [C, 1, 3, 3], bias [C] -> [10, pitch] in the compute type; `turned`: for the gradient of x, without
// bias.
Tensor pack(const PdcStencil& s, const Tensor& weight_, const std::optional<Tensor>& bias_, bool for_dx) {
  const Tensor weight = in_layout(weight_);
  const std::optional<Tensor> bias = bias_ ? std::optional(in_layout(*bias_)) : std::nullopt;
  const ScalarType compute = s.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor packed = torch::stable::new_zeros(weight, {kPdcRows, s.pitch}, compute);
  with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    const T* shift = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    A* to = static_cast<A*>(packed.mutable_data_ptr());
    for (int64_t c = 0; c < s.channels; ++c) {
      A w[kPdcWeights];
      for (int k = 0; k < kPdcWeights; ++k) w[k] = load(from[c * kPdcWeights + k]);
      if (for_dx)
        with_kind(s.kind, [&](auto kind) { turn<decltype(kind)::value>(w, static_cast<A>(s.theta)); });
      for (int k = 0; k < kPdcWeights; ++k) to[k * s.pitch + c] = w[k];
      if (shift) to[kPdcWeights * s.pitch + c] = load(shift[c]);
    }
  });
  return packed;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Zeroed, aligned to a cache line; null when there is no memory.
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

// Runs `first` and then `second` (either may be null) on blocks of the strips of all planes.
void run_planes(const PdcStencil* sums, const PdcStencil* out, int64_t strips) {
  const PdcKernels& kernels = pdc_kernels();
  const PdcStencil& any = out ? *out : *sums;
  const int64_t sums_bytes = sums ? kernels.strip_elements(*sums, strips) * compute_size(any) : 0;
  const int64_t out_bytes = out ? kernels.strip_elements(*out, strips) * compute_size(any) : 0;
  const int64_t outputs = at_least_one(any.y.out * any.x.out / strips);
  const int64_t block = at_least_one(kBlockOutputs / outputs);
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, any.batch * any.channels * strips, at_least_one(kGrain / outputs),
                              [&](int64_t begin, int64_t end) {
                                const Scratch sums_scratch(sums_bytes), out_scratch(out_bytes);
                                if (!sums_scratch.get() || !out_scratch.get()) {
                                  failed = true;
                                  return;
                                }
                                for (int64_t first = begin; first < end; first += block) {
                                  const int64_t last = first + block < end ? first + block : end;
                                  if (sums)
                                    kernels.sums_strips(*sums, sums_scratch.get(), strips, first, last);
                                  if (out)
                                    kernels.stencil_strips(*out, out_scratch.get(), strips, first, last);
                                }
                              });
  STD_TORCH_CHECK(!failed, "pdc2d: no memory for a scratch of ", sums_bytes + out_bytes, " bytes");
}

// The same in channels_last: each image is cut into `runs` runs of rows.
void run_pixels(const PdcStencil* sums, const PdcStencil* out, int64_t runs) {
  const PdcKernels& kernels = pdc_kernels();
  const PdcStencil& any = out ? *out : *sums;
  const std::vector<char> zeros(any.channels * compute_size(any), 0);
  const int64_t outputs = at_least_one(any.y.out * any.x.out * any.channels / runs);
  torch::stable::parallel_for(0, any.batch * runs, at_least_one(kGrain / outputs),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t item = begin; item < end; ++item) {
                                  const int64_t image = item / runs, index = item % runs;
                                  const auto row = [&](int64_t rows, int64_t i) { return rows * i / runs; };
                                  if (sums) {
                                    kernels.sums_rows(*sums, zeros.data(), image, row(sums->y.out, index),
                                                      row(sums->y.out, index + 1), item);
                                  }
                                  if (out) {
                                    kernels.stencil_rows(*out, zeros.data(), image, row(out->y.out, index),
                                                         row(out->y.out, index + 1));
                                  }
                                }
                              });
}

Tensor pdc2d_depthwise(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias,
                       int64_t kind, double theta, const Ints& stride, const Ints& padding,
                       const Ints& dilation) {
  const PdcGeometry g = checked_pdc(x_, weight, bias, kind, theta, stride, padding, dilation);
  const MemoryFormat format = layout_of(x_);
  const Tensor x = in_layout(x_, format);
  PdcStencil s = stencil(g, x);
  Tensor y = empty_images(x, s.channels, s.y.out, s.x.out, format);
  if (s.batch == 0 || s.channels == 0) return y;
  const Tensor packed = pack(s, weight, bias, false);
  s.source = x.const_data_ptr(), s.weights = packed.const_data_ptr(), s.out = y.mutable_data_ptr();
  if (format == MemoryFormat::ChannelsLast) {
    const int64_t rows = at_least_one(kRunOutputs / (s.x.out * s.channels));
    run_pixels(nullptr, &s, (s.y.out + rows - 1) / rows);
  } else {
    run_planes(nullptr, &s, pdc_kernels().strips(s));
  }
  return y;
}

// sums: planes [B, C, parts, 10], pixels [B * parts, 10, pitch] -> dw [C, 1, 3, 3], db [C], in ascending
// order.
void reduce(const PdcStencil& s, const Tensor& sums, int64_t parts, bool pixels, Tensor& dw, Tensor& db) {
  with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const A* from = static_cast<const A*>(sums.const_data_ptr());
    T* weights = static_cast<T*>(dw.mutable_data_ptr());
    T* biases = static_cast<T*>(db.mutable_data_ptr());
    std::vector<A> total(kPdcRows * s.pitch, A(0));
    if (pixels) {
      for (int64_t item = 0; item < s.batch * parts; ++item, from += kPdcRows * s.pitch) {
        for (int64_t i = 0; i < kPdcRows * s.pitch; ++i) total[i] += from[i];
      }
    } else {
      for (int64_t item = 0; item < s.batch * s.channels * parts; ++item, from += kPdcRows) {
        const int64_t c = item / parts % s.channels;
        for (int k = 0; k < kPdcRows; ++k) total[k * s.pitch + c] += from[k];
      }
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int k = 0; k < kPdcWeights; ++k) store(weights[c * kPdcWeights + k], total[k * s.pitch + c]);
      store(biases[c], total[kPdcWeights * s.pitch + c]);
    }
  });
}

// grad [B, C, H', W'] -> dx [B, C, H, W], dw [C, 1, 3, 3], db [C]; what is not needed comes back as [0]
std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad_, const Tensor& x_,
                                                            const Tensor& weight, int64_t kind, double theta,
                                                            const Ints& stride, const Ints& padding,
                                                            const Ints& dilation, bool need_dx,
                                                            bool need_dw) {
  const PdcGeometry g = checked_pdc(x_, weight, std::nullopt, kind, theta, stride, padding, dilation);
  check_pdc_grad(g, grad_, x_);
  const MemoryFormat format = layout_of(x_);
  const bool pixels = format == MemoryFormat::ChannelsLast;
  const Tensor x = in_layout(x_, format), grad = in_layout(grad_, format);
  PdcStencil s = stencil(g, x), t = turned(s);
  Tensor dx = need_dx ? empty_images(x, s.channels, s.y.source, s.x.source, format)
                      : torch::stable::new_empty(x, {0});
  Tensor dw = need_dw ? torch::stable::new_zeros(weight, {s.channels, 1, 3, 3})
                      : torch::stable::new_empty(weight, {0});
  Tensor db = torch::stable::new_zeros(weight, {need_dw ? s.channels : 0});
  if (s.batch == 0 || s.channels == 0 || !(need_dx || need_dw)) return {dx, dw, db};

  const Tensor packed = pack(s, weight, std::nullopt, true);
  t.source = grad.const_data_ptr(), t.weights = packed.const_data_ptr(), t.out = dx.mutable_data_ptr();
  s.source = x.const_data_ptr(), s.grad = grad.const_data_ptr();
  const int64_t rows = s.y.out < t.y.out ? s.y.out : t.y.out;
  const auto limit = [&](int64_t n) { return n > rows ? at_least_one(rows) : at_least_one(n); };
  const int64_t parts =
      limit(pixels ? s.y.out * s.x.out * s.channels / kSumOutputs
                   : std::max(pdc_kernels().strips(s), need_dx && t.y.out ? pdc_kernels().strips(t) : 1));
  Tensor sums =
      need_dw ? torch::stable::new_zeros(packed, {s.batch, parts, pixels ? s.pitch : s.channels, kPdcRows})
              : dw;
  s.sums = need_dw ? sums.mutable_data_ptr() : nullptr;
  (pixels ? run_pixels : run_planes)(need_dw ? &s : nullptr, need_dx ? &t : nullptr, parts);
  if (need_dw) reduce(s, sums, parts, pixels, dw, db);
  return {dx, dw, db};
}

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
