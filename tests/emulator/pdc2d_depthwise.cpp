// The CUDA kernels of the depthwise difference convolution and their launchers on the CPU, against plain
// loops in double over the table of taps.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "core/cuda_compat.h"
// Inlined by force into every kernel, the unrolled arithmetic takes g++ twice as long to compile.
#undef __forceinline__
#define __forceinline__ inline

#include "pdc/cuda/gather.cu"
#include "pdc/cuda/channels_last.cu"
#include "pdc/cuda/nchw.cu"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace {

std::mt19937 generator(1);

// `count` numbers in a heap block that ends with the last of them; `odd`: its first element is not used, so
// that no vector is aligned.
template <class T>
struct Numbers {
  std::unique_ptr<T[]> block;
  std::vector<double> value;
  T* data;

  explicit Numbers(int64_t count, bool odd = false, bool nan = false)
      : block(new T[count + odd]), value(count), data(block.get() + odd) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      frd::store(data[i], nan ? NAN : 3 + normal(generator));
      value[i] = load(data[i]);
    }
  }
};

struct Case {
  int batch, channels, height, width;
  int stride = 1, padding = 1, dilation = 1;
  bool odd = false;  // nothing is aligned to more than an element
  bool bias = true;
};

struct Run {
  Case c;
  PdcKind kind;
  double theta;
  bool channels_last;
  PdcAxis y, x;

  Run(const Case& c_, PdcKind kind_, double theta_, bool channels_last_)
      : c(c_), kind(kind_), theta(theta_), channels_last(channels_last_) {
    const auto axis = [&](int64_t size) {
      const int64_t extra = kind == PdcKind::radial ? c.dilation : 0;
      return PdcAxis{size,
                     (size + 2 * c.padding - 2 * c.dilation - 1) / c.stride + 1,
                     c.padding + extra,
                     c.stride,
                     1,
                     c.dilation};
    };
    y = axis(c.height), x = axis(c.width);
  }
  int64_t inputs() const { return int64_t{c.batch} * c.channels * c.height * c.width; }
  int64_t outputs() const { return c.batch * c.channels * y.out * x.out; }
  int64_t index(int b, int ch, int64_t row, int64_t column, int64_t height, int64_t width) const {
    return channels_last ? ((b * height + row) * width + column) * c.channels + ch
                  : ((int64_t{b} * c.channels + ch) * height + row) * width + column;
  }

  // f(output, channel, weight, input or -1 for a zero, its coefficient) for every term.
  template <class F>
  void each_term(F f) const {
    const int reach = kernel_side(kind) / 2;
    for (int b = 0; b < c.batch; ++b)
      for (int ch = 0; ch < c.channels; ++ch)
        for (int64_t qy = 0; qy < y.out; ++qy)
          for (int64_t qx = 0; qx < x.out; ++qx)
            for (int k = 0; k < kPdcWeights; ++k) {
              const auto term = [&](Tap t, double factor) {
                const int64_t row = qy * c.stride + (t.dy + reach) * c.dilation - y.padding;
                const int64_t column = qx * c.stride + (t.dx + reach) * c.dilation - x.padding;
                if (row < 0 || row >= c.height || column < 0 || column >= c.width) return;
                f(index(b, ch, qy, qx, y.out, x.out), ch, k, index(b, ch, row, column, c.height, c.width),
                  factor);
              };
              term(plus_tap(kind, k), 1);
              if (kind != PdcKind::vanilla) term(minus_tap(kind, k), -theta);
            }
  }
};

template <class T>
constexpr double kUnit = sizeof(T) == 8           ? 0x1p-53
                         : sizeof(T) == 4         ? 0x1p-24
                         : std::is_same_v<T, f16> ? 0x1p-11
                                                  : 0x1p-8;

// How many of got differ from want by more than the rounding of one store and of sums whose terms add up to
// `size` in magnitude.
template <class T>
int64_t wrong(const char* what, const T* got, const std::vector<double>& want,
              const std::vector<double>& size) {
  const double compute = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
  int64_t bad = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(static_cast<double>(load(got[i])) - want[i]);
    if (!(error <= kUnit<T> * std::fabs(want[i]) + 8 * compute * size[i] + 1e-7)) {
      if (bad++ == 0)
        std::printf("  %s[%zu] is %g, not %g\n", what, i, static_cast<double>(load(got[i])), want[i]);
    }
  }
  return bad;
}

template <class T>
int64_t forward_errors(const Run& r, PdcProblem p, const Numbers<T>& x, const Numbers<T>& w,
                       const Numbers<T>& bias) {
  Numbers<T> out(r.outputs(), r.c.odd, true);
  p.out = out.data, p.bias = r.c.bias ? bias.data : nullptr;
  std::vector<double> want(r.outputs(), 0), size(r.outputs(), 0);
  for (int64_t i = 0; i < r.outputs(); ++i) {
    const int64_t ch = r.channels_last ? i % r.c.channels : i / (r.y.out * r.x.out) % r.c.channels;
    want[i] = r.c.bias ? bias.value[ch] : 0;
    size[i] = std::fabs(want[i]);
  }
  r.each_term([&](int64_t q, int ch, int k, int64_t from, double factor) {
    const double term = w.value[ch * kPdcWeights + k] * factor * x.value[from];
    want[q] += term, size[q] += std::fabs(term);
  });
  pdc_forward_cuda(p, nullptr);
  return wrong("y", out.data, want, size);
}

template <class T>
int64_t backward_errors(const Run& r, PdcProblem p, const Numbers<T>& x, const Numbers<T>& w, bool need_dx,
                        bool need_dw) {
  using A = compute_t<T>;
  const int channels = r.c.channels;
  const Numbers<T> grad(r.outputs(), r.c.odd);
  Numbers<T> dx(r.inputs(), r.c.odd, true), dw(channels * kPdcWeights, false, true),
      db(channels, false, true);
  p.grad = grad.data, p.out = need_dx ? dx.data : nullptr;
  const int parts = pdc_parts_cuda(p);
  Numbers<A> sums(int64_t{parts} * kPdcSums * channels, false, true);
  if (need_dw) p.dw = dw.data, p.db = db.data, p.sums = sums.data;
  std::vector<double> want_x(r.inputs(), 0), size_x(r.inputs(), 0), want_w(channels * kPdcWeights, 0),
      size_w = want_w;
  std::vector<double> want_b(channels, 0), size_b = want_b;
  r.each_term([&](int64_t q, int ch, int k, int64_t from, double factor) {
    const double in = w.value[ch * kPdcWeights + k] * factor * grad.value[q];
    const double weight = factor * x.value[from] * grad.value[q];
    want_x[from] += in, size_x[from] += std::fabs(in);
    want_w[ch * kPdcWeights + k] += weight, size_w[ch * kPdcWeights + k] += std::fabs(weight);
  });
  for (int64_t i = 0; i < r.outputs(); ++i) {
    const int64_t ch = r.channels_last ? i % channels : i / (r.y.out * r.x.out) % channels;
    want_b[ch] += grad.value[i], size_b[ch] += std::fabs(grad.value[i]);
  }
  pdc_backward_cuda(p, nullptr);
  int64_t bad = 0;
  if (need_dx) bad += wrong("dx", dx.data, want_x, size_x);
  if (need_dw) bad += wrong("dw", dw.data, want_w, size_w) + wrong("db", db.data, want_b, size_b);
  return bad;
}

int64_t total = 0;

// Weights that no gradient reaches (x - x at theta 1) get exactly 0 from the loops above too.
template <class T>
void check(const Case& c, DType dtype, PdcKind kind, double theta, bool channels_last, bool need_dx = true,
           bool need_dw = true) {
  const Run r(c, kind, theta, channels_last);
  const Numbers<T> x(r.inputs(), c.odd), w(c.channels * kPdcWeights), bias(c.channels);
  PdcProblem p{};
  p.y = r.y, p.x = r.x, p.batch = c.batch, p.channels = c.channels;
  p.kind = kind, p.theta = theta, p.dtype = dtype, p.channels_last = channels_last;
  p.source = x.data, p.weight = w.data;
  const int64_t bad = forward_errors<T>(r, p, x, w, bias) + backward_errors<T>(r, p, x, w, need_dx, need_dw);
  if (bad) {
    std::printf(
        "%ld wrong: [%d, %d, %d, %d] kind %d theta %g dtype %d %s stride %d padding %d dilation %d%s\n",
        static_cast<long>(bad), c.batch, c.channels, c.height, c.width, static_cast<int>(kind), theta,
        static_cast<int>(dtype), channels_last ? "channels_last" : "contiguous", c.stride, c.padding, c.dilation,
        c.odd ? " odd" : "");
  }
  total += bad;
}

template <class T>
void check_kinds(const Case& c, DType dtype, bool channels_last) {
  for (int kind = 0; kind < 4; ++kind) {
    check<T>(c, dtype, static_cast<PdcKind>(kind), 1, channels_last);
    if (kind > 0) check<T>(c, dtype, static_cast<PdcKind>(kind), 0.7, channels_last);
  }
}

template <class T>
void check_dtype(DType dtype) {
  // The tiled kernels: whole and hanging subtiles, several groups of channels, several images.
  check_kinds<T>({2, 70, 9, 7}, dtype, true);
  check_kinds<T>({1, 16, 17, 18}, dtype, true);
  check_kinds<T>({3, 36, 10, 5, 1, 0}, dtype, true);
  check_kinds<T>({2, 3, 13, 16}, dtype, false);
  check_kinds<T>({1, 2, 9, 11}, dtype, false);
  const PdcKind some[] = {PdcKind::central, PdcKind::angular, PdcKind::radial};
  int turn = 0;
  for (const bool channels_last : {true, false}) {
    for (const Case& c :
         {Case{1, 6, 12, 10, 1, 2, 2}, Case{1, 6, 6, 16, 1, 0, 1}, Case{2, 4, 5, 8, 1, 3, 1},
          Case{1, 4, 9, 8, 2, 1, 1}, Case{1, 5, 8, 9, 3, 2, 2, false, false}, Case{1, 8, 6, 8, 1, 1, 1, true},
          Case{3, 1, 3, 3, 1, 1, 1}, Case{1, 4, 3, 8, 1, 5, 5}, Case{1, 33, 1, 1, 1, 1, 1}}) {
      const double theta = ++turn % 2 ? 1 : 0.7;
      check<T>(c, dtype, some[turn % 3], theta, channels_last, turn % 4 != 1, turn % 4 != 2);
    }
  }
}

}  // namespace

int main() {
  check_dtype<float>(DType::f32);
  check_dtype<bf16>(DType::bf16);
  check_dtype<f16>(DType::f16);
  check_dtype<double>(DType::f64);
  // Many tiles: blocks and warps that go through several of them, and more parts than one row adds.
  check<bf16>({40, 2, 16, 16}, DType::bf16, PdcKind::angular, 1, true);
  check<bf16>({40, 1, 16, 16}, DType::bf16, PdcKind::angular, 1, false);
  std::printf("%ld wrong\n", static_cast<long>(total));
  return total != 0;
}
