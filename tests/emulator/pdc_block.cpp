// The fused block's CUDA kernels on the CPU against plain loops in double.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "pdc_block/cuda/block.cuh"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace {

std::mt19937 generator(1);

// `count` numbers, the first at an odd element of the heap block if `odd`; a read beyond the last stops the
// test.
template <class T>
struct Numbers {
  std::vector<T> store;
  std::vector<double> value;
  T* data = nullptr;
  Numbers() = default;
  Numbers(int64_t count, bool odd, double scale = 1, bool nan = false) : store(count + odd), value(count) {
    std::normal_distribution<float> normal(0, static_cast<float>(scale));
    data = store.data() + odd;
    for (int64_t i = 0; i < count; ++i) {
      frd::store(data[i], nan ? NAN : normal(generator));
      value[i] = load(data[i]);
    }
  }
};

template <class T>
constexpr double kHalfUlp = sizeof(T) == 4           ? 0x1p-24
                            : std::is_same_v<T, f16> ? 0x1p-11
                                                     : 0x1p-8;
template <class T>
constexpr double kSmallest = std::is_same_v<T, f16> ? 0x1p-25 : 0;

struct Case {
  int batch, channels, outs, height, width;
  int kind;  // -1: copy
  bool channels_last = true;
  double theta = 1;
  int stride_y = 1, stride_x = 1, dilation_y = 1, dilation_x = 1;
  bool biases = true, residual = true, gate = false, odd = false;
};

template <class T>
struct Operands {
  BlockProductArgs a{};
  Numbers<T> x, stencil, stencil_bias, point, point_bias, residual, gate, out;

  explicit Operands(const Case& c) {
    a.channels_last = c.channels_last;
    a.kind = static_cast<PdcKind>(c.kind < 0 ? 0 : c.kind);
    a.pure = c.theta == 1, a.theta = static_cast<float>(c.theta);
    a.batch = c.batch, a.channels = c.channels, a.height = c.height, a.width = c.width;
    a.out_channels = c.outs;
    a.stride_y = c.stride_y, a.stride_x = c.stride_x, a.dilation_y = c.dilation_y,
    a.dilation_x = c.dilation_x;
    a.out_height = (c.height - 1) / c.stride_y + 1, a.out_width = (c.width - 1) / c.stride_x + 1;
    const bool plain = c.stride_y * c.stride_x * c.dilation_y * c.dilation_x == 1 && (a.pure || c.kind == 0);
    a.prologue = c.kind < 0 ? Prologue::copy : plain ? static_cast<Prologue>(c.kind + 1) : Prologue::gather;
    const int64_t outputs = int64_t{1} * c.batch * c.outs * a.out_height * a.out_width;
    x = Numbers<T>(int64_t{1} * c.batch * c.channels * c.height * c.width, c.odd);
    stencil = Numbers<T>(c.channels * 9, c.odd);
    stencil_bias = Numbers<T>(c.channels, c.odd);
    point = Numbers<T>(int64_t{1} * c.outs * c.channels, c.odd, 1 / std::sqrt(c.channels));
    point_bias = Numbers<T>(c.outs, c.odd), residual = Numbers<T>(outputs, c.odd);
    gate = Numbers<T>(outputs, c.odd), out = Numbers<T>(outputs, c.odd, 1, true);
    a.x = x.data, a.point = point.data, a.out = out.data;
    if (c.kind >= 0) a.stencil = stencil.data;
    if (c.kind >= 0 && c.biases) a.stencil_bias = stencil_bias.data;
    if (c.biases) a.point_bias = point_bias.data;
    if (c.residual) a.residual = residual.data;
    if (c.gate) a.gate = gate.data;
  }

  int64_t at(int b, int c, int y, int x_, int channels, int height, int width) const {
    return a.channels_last ? ((int64_t{b} * height + y) * width + x_) * channels + c
                           : ((int64_t{b} * channels + c) * height + y) * width + x_;
  }
  double tap(int b, int c, int y, int x_) const {
    const bool inside = y >= 0 && x_ >= 0 && y < a.height && x_ < a.width;
    return inside ? x.value[at(b, c, y, x_, a.channels, a.height, a.width)] : 0;
  }
  // the hidden value, and the sum of its absolute terms
  double hidden(int b, int c, int y, int x_, double& size) const {
    if (a.prologue == Prologue::copy) return size = 0, tap(b, c, y, x_);
    double sum = a.stencil_bias ? stencil_bias.value[c] : 0;
    size = std::fabs(sum);
    for (int k = 0; k < 9; ++k) {
      const Tap plus = plus_tap(a.kind, k), minus = minus_tap(a.kind, k);
      const auto at_tap = [&](Tap t) {
        return tap(b, c, y * a.stride_y + t.dy * a.dilation_y, x_ * a.stride_x + t.dx * a.dilation_x);
      };
      const double first = at_tap(plus), second = a.kind == PdcKind::vanilla ? 0 : a.theta * at_tap(minus);
      sum += stencil.value[c * 9 + k] * (first - second);
      size += std::fabs(stencil.value[c * 9 + k]) * (std::fabs(first) + std::fabs(second));
    }
    return sum > 0 ? sum : 0;
  }

  // Outputs that miss: one rounding of the result, one of each hidden value to 16 bit, float32 between.
  int wrong() const {
    int count = 0;
    for (int b = 0; b < a.batch; ++b)
      for (int y = 0; y < a.out_height; ++y)
        for (int x_ = 0; x_ < a.out_width; ++x_) {
          std::vector<double> h(a.channels), size(a.channels);
          for (int c = 0; c < a.channels; ++c) h[c] = hidden(b, c, y, x_, size[c]);
          for (int o = 0; o < a.out_channels; ++o) count += !right(b, o, y, x_, h, size);
        }
    return count;
  }
  bool right(int b, int o, int y, int x_, const std::vector<double>& h,
             const std::vector<double>& size) const {
    const int64_t i = at(b, o, y, x_, a.out_channels, a.out_height, a.out_width);
    double want = 0, rounded = 0, terms = 0;
    for (int c = 0; c < a.channels; ++c) {
      const double w = point.value[int64_t{o} * a.channels + c];
      want += w * h[c], rounded += std::fabs(w) * h[c] * (a.prologue != Prologue::copy);
      terms += std::fabs(w) * (size[c] + std::fabs(h[c]) + kSmallest<T> * 0x1p22);
    }
    if (a.point_bias) want += point_bias.value[o], terms += std::fabs(point_bias.value[o]);
    if (a.residual) want += residual.value[i], terms += std::fabs(residual.value[i]);
    if (a.gate && gate.value[i] <= 0) return load(out.data[i]) == 0;
    const double allowed =
        kHalfUlp<T> * (std::fabs(want) + (sizeof(T) == 2 ? 1.01 * rounded : 0)) + 0x1p-21 * terms;
    return std::fabs(load(out.data[i]) - want) <= allowed * 1.001 + kSmallest<T>;
  }
};

constexpr CudaLimits kRoomy{3, 232448, 233472}, kTight{2, 65536, 65536};

template <class T, bool kPixels, class Tile>
int check(Case c, const CudaLimits& limits = kRoomy) {
  c.channels_last = kPixels;
  Operands<T> o(c);
  const cudaError_t error = launch_product<T, kPixels, Tile>(o.a, limits, nullptr);
  const int wrong = o.wrong() + (error != cudaSuccess);
  if (wrong)
    std::printf("%zu bytes, tile of %d, kind %d theta %g %s, [%d, %d, %d, %d] -> %d: %d wrong\n", sizeof(T),
                Tile::kOuts, c.kind, c.theta, kPixels ? "pixels" : "planes", c.batch, c.channels, c.height,
                c.width, c.outs, wrong);
  return wrong;
}

Case unaligned(Case c) {
  c.odd = true;
  return c;
}
Case gated(Case c) {
  c.gate = true, c.residual = false, c.biases = false;
  return c;
}
Case bare(Case c) {
  c.residual = false, c.biases = false;
  return c;
}
Case stepping(Case c, double theta, int stride_y, int stride_x, int dilation_y, int dilation_x) {
  c.theta = theta, c.stride_y = stride_y, c.stride_x = stride_x;
  c.dilation_y = dilation_y, c.dilation_x = dilation_x;
  return c;
}

// Ragged tiles, two images, channels of more than a slab and of less, more output channels than a tile.
template <class T, bool kPixels>
int check_small() {
  int wrong = 0;
  for (int kind = -1; kind < 4; ++kind) {
    wrong += check<T, kPixels, SmallTile>({2, 72, 40, 3, 12, kind});
    wrong += check<T, kPixels, SmallTile>(unaligned({1, 17, 5, 5, 9, kind}));
  }
  for (int kind = 0; kind < 4; ++kind)
    wrong += check<T, kPixels, SmallTile>(stepping(bare({1, 17, 5, 5, 9, kind}), 0.7, 1, 1, 1, 1));
  wrong += check<T, kPixels, SmallTile>(stepping({1, 24, 7, 9, 9, 1}, 0.7, 2, 1, 1, 2));
  wrong += check<T, kPixels, SmallTile>(stepping({1, 16, 8, 9, 16, 3}, 1, 1, 2, 2, 1));
  wrong += check<T, kPixels, SmallTile>(gated({1, 40, 24, 4, 8, -1}));
  return wrong + check<T, kPixels, SmallTile>(unaligned(gated({1, 33, 9, 4, 7, -1})));
}

template <class T, bool kPixels>
int check_medium() {
  int wrong = 0;
  for (int kind = 0; kind < 4; ++kind) wrong += check<T, kPixels, MediumTile>({1, 72, 136, 5, 10, kind});
  wrong += check<T, kPixels, MediumTile>(gated({1, 8, 24, 8, 8, -1}));
  return wrong + check<T, kPixels, MediumTile>(bare({1, 200, 24, 10, 8, 2}), kTight);
}

template <class T, bool kPixels>
int check_large() {
  return check<T, kPixels, LargeTile>({2, 136, 264, 7, 17, 2}) +        // tiles in turn, their weight kept
         check<T, kPixels, LargeTile>({1, 72, 40, 8, 18, 3}, kTight) +  // in turn, their weight read anew
         check<T, kPixels, LargeTile>({1, 8, 8, 5, 6, 1});
}

}  // namespace

int main() {
  int wrong = check_small<bf16, true>() + check_small<bf16, false>() + check_small<float, true>();
  wrong += check_small<float, false>() + check_medium<bf16, true>() + check_medium<f16, false>();
  wrong += check_medium<float, true>() + check_large<bf16, false>() + check_large<f16, true>();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
