// The fused block over tiles: hidden values, the 1x1 convolution as a GEMM, and their backward pass.
#include "pdc_block/cpu/kernel.h"

#include "core/gemm.h"
#include "pdc_block/cpu/hidden.h"

namespace frd {
namespace FRD_ISA {
namespace {

template <class A>
const GemmOps<A>& gemm() {
  if constexpr (sizeof(A) == 8)
    return gemm_kernels().f64;
  else
    return gemm_kernels().f32;
}

// Rows of a product, so that the epilogue finds them in the first-level cache.
constexpr int64_t kStrip = 48;

int64_t tile_pixels(const PdcBlockArgs& a) { return a.tile_rows * a.tile_columns; }

// Row stride of a tile that holds channels by pixels.
template <class A>
int64_t tile_stride(const PdcBlockArgs& a) {
  return round_up(tile_pixels(a), gemm<A>().panel);
}

// Hands out aligned parts of the scratch; with a null base it only counts their size.
template <class A>
struct Arena {
  A* base;
  int64_t used = 0;
  A* take(int64_t n) {
    A* part = base ? base + used : nullptr;
    used += round_up(n, kVecBytes / sizeof(A));
    return part;
  }
};

template <class A>
struct ForwardScratch {
  A *staged, *line, *hidden, *packed, *strip;
  int64_t elements;
  ForwardScratch(const PdcBlockArgs& a, A* base) {
    const int64_t lanes = Vec<A>::lanes;
    const int64_t stride = tile_stride<A>(a);
    Arena<A> arena{base};
    staged = arena.take(a.channels_last ? 0 : staged_elements(a, lanes));
    line = arena.take(a.channels_last ? 0 : staged_elements(a, lanes));
    hidden = arena.take(a.channels * stride + lanes);
    packed = arena.take(a.channels_last ? 0 : gemm<A>().packed_size(a.channels, tile_pixels(a)));
    strip = arena.take(kStrip * (a.channels_last ? a.out_channels : stride));
    elements = arena.used;
  }
};

// out [n] = sums (+ bias) (+ residual), rounded once. bias: [n] if bias_each, else one value; it and residual
// may be null.
template <class T>
void finish_row(const compute_t<T>* sums, const compute_t<T>* bias, bool bias_each, const T* residual, T* out,
                int64_t n) {
  typedef compute_t<T> A;
  typedef Vec<A> V;
  const A shared = bias && !bias_each ? *bias : A(0);
  const A* each = bias_each ? bias : nullptr;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    typename V::type v = V::load(sums + i) + shared;
    if (each) v += V::load(each + i);
    if (residual) v += V::load(residual + i);
    V::store(out + i, v);
  }
  for (; i < n; ++i) {
    A v = sums[i] + shared;
    if (each) v += each[i];
    if (residual) v += load(residual[i]);
    store(out[i], v);
  }
}

// out [Co, pixels] = point [Co, C] hidden [C, pixels] (+ bias) (+ residual)
template <class T>
void forward_nchw(const PdcBlockArgs& a, const Tile& t, const ForwardScratch<compute_t<T>>& s) {
  typedef compute_t<T> A;
  const int64_t pixels = t.pixels();
  const int64_t stride = tile_stride<A>(a);
  const int64_t plane = a.out_height * a.out_width;
  hidden_nchw<T>(a, t, s.staged, s.line, s.hidden, stride);
  gemm<A>().pack(s.hidden, stride, 1, a.channels, pixels, s.packed);
  const A* point = static_cast<const A*>(a.point);
  const A* bias = static_cast<const A*>(a.point_bias);
  for (int64_t o = 0; o < a.out_channels; o += kStrip) {
    const int64_t rows = a.out_channels - o < kStrip ? a.out_channels - o : kStrip;
    gemm<A>().run(point + o * a.channels, a.channels, s.packed, s.strip, stride, rows, pixels, a.channels,
                  false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (t.image * a.out_channels + o + r) * plane + t.y * a.out_width + t.x;
      finish_row<T>(s.strip + r * stride, bias ? bias + o + r : nullptr, false,
                    a.residual ? static_cast<const T*>(a.residual) + at : nullptr,
                    static_cast<T*>(a.out) + at, pixels);
    }
  }
}

// out [pixels, Co] = hidden [pixels, C] point^T [C, Co] (+ bias) (+ residual)
template <class T>
void forward_channels_last(const PdcBlockArgs& a, const Tile& t, const ForwardScratch<compute_t<T>>& s) {
  typedef compute_t<T> A;
  const int64_t first = (t.image * a.out_height + t.y) * a.out_width + t.x;
  const int64_t pixels = t.pixels();
  hidden_channels_last<T>(a, t, s.hidden);
  for (int64_t p = 0; p < pixels; p += kStrip) {
    const int64_t rows = pixels - p < kStrip ? pixels - p : kStrip;
    gemm<A>().run(s.hidden + p * a.channels, a.channels, static_cast<const A*>(a.point), s.strip,
                  a.out_channels, rows, a.out_channels, a.channels, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first + p + r) * a.out_channels;
      finish_row<T>(s.strip + r * a.out_channels, static_cast<const A*>(a.point_bias),
                    a.point_bias != nullptr, a.residual ? static_cast<const T*>(a.residual) + at : nullptr,
                    static_cast<T*>(a.out) + at, a.out_channels);
    }
  }
}

template <class T>
void forward_tiles(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end) {
  const ForwardScratch<compute_t<T>> s(a, static_cast<compute_t<T>*>(scratch));
  for (int64_t i = begin; i < end; ++i)
    a.channels_last ? forward_channels_last<T>(a, tile_at(a, i), s) : forward_nchw<T>(a, tile_at(a, i), s);
}

template <class A>
struct BackwardScratch {
  A *staged, *line, *hidden, *grad, *packed_grad, *packed_hidden, *product;
  int64_t elements;
  BackwardScratch(const PdcBlockArgs& a, A* base) {
    const int64_t lanes = Vec<A>::lanes;
    const int64_t stride = tile_stride<A>(a);
    const int64_t pixels = tile_pixels(a);
    Arena<A> arena{base};
    staged = arena.take(a.channels_last ? 0 : staged_elements(a, lanes));
    line = arena.take(a.channels_last ? 0 : staged_elements(a, lanes));
    hidden = arena.take(a.channels * stride + lanes);
    grad = arena.take(a.out_channels * stride);
    packed_grad = arena.take(a.channels_last ? 0 : gemm<A>().packed_size(a.out_channels, pixels));
    packed_hidden = arena.take(gemm<A>().packed_size(pixels, a.channels));
    product = arena.take(a.channels * stride);
    elements = arena.used;
  }
};

// out [n] = grad where hidden > 0 or NaN, as in torch, else 0: the gradient of the ReLU.
template <class T>
void mask_row(const compute_t<T>* grad, const compute_t<T>* hidden, T* out, int64_t n) {
  typedef compute_t<T> A;
  typedef Vec<A> V;
  const typename V::type zero = {};
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes)
    V::store(out + i, V::load(hidden + i) <= zero ? zero : V::load(grad + i));
  for (; i < n; ++i) store(out[i], hidden[i] <= A(0) ? A(0) : grad[i]);
}

// Rows [count, n] with row stride `stride` in the compute type: a pointer to them if they have it, else to
// `copy`, with the row stride in out_stride.
template <class T>
const compute_t<T>* converted(const T* rows, int64_t stride, int64_t count, int64_t n, compute_t<T>* copy,
                              int64_t* out_stride) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    *out_stride = stride;
    return rows;
  } else {
    for (int64_t r = 0; r < count; ++r) copy_row(rows + r * stride, copy + r * *out_stride, n);
    return copy;
  }
}

// hidden_grad = (point^T grad) where hidden > 0; sums (+=) grad hidden^T [Co, C], then the sums of grad [Co].
template <class T>
void backward_nchw(const PdcBlockArgs& a, const Tile& t, const BackwardScratch<compute_t<T>>& s,
                   compute_t<T>* sums, bool accumulate) {
  typedef compute_t<T> A;
  typedef Vec<A> V;
  const int64_t pixels = t.pixels();
  const int64_t stride = tile_stride<A>(a);
  const int64_t plane = a.out_height * a.out_width;
  const int64_t offset = t.y * a.out_width + t.x;
  int64_t grad_stride = stride;
  const T* from = static_cast<const T*>(a.grad) + t.image * a.out_channels * plane + offset;
  const A* grad = converted(from, plane, a.out_channels, pixels, s.grad, &grad_stride);
  hidden_nchw<T>(a, t, s.staged, s.line, s.hidden, stride);
  gemm<A>().pack(grad, grad_stride, 1, a.out_channels, pixels, s.packed_grad);
  gemm<A>().run_at(static_cast<const A*>(a.point), a.channels, s.packed_grad, s.product, stride, a.channels,
                   pixels, a.out_channels, false);
  T* to = static_cast<T*>(a.hidden_grad) + t.image * a.channels * plane + offset;
  for (int64_t c = 0; c < a.channels; ++c)
    mask_row(s.product + c * stride, s.hidden + c * stride, to + c * plane, pixels);
  gemm<A>().pack(s.hidden, 1, stride, pixels, a.channels, s.packed_hidden);
  gemm<A>().run(grad, grad_stride, s.packed_hidden, sums, a.channels, a.out_channels, a.channels, pixels,
                accumulate);
  A* bias = sums + a.out_channels * a.channels;
  for (int64_t o = 0; o < a.out_channels; ++o) {
    typename V::type partial = {};
    int64_t i = 0;
    for (; i + V::lanes <= pixels; i += V::lanes) partial += V::load(grad + o * grad_stride + i);
    A sum = 0;
    for (int j = 0; j < V::lanes; ++j) sum += partial[j];
    for (; i < pixels; ++i) sum += grad[o * grad_stride + i];
    bias[o] = accumulate ? bias[o] + sum : sum;
  }
}

// The same, hidden_grad [pixels, C] = (grad point) where hidden > 0.
template <class T>
void backward_channels_last(const PdcBlockArgs& a, const Tile& t, const BackwardScratch<compute_t<T>>& s,
                            compute_t<T>* sums, bool accumulate) {
  typedef compute_t<T> A;
  const int64_t first = (t.image * a.out_height + t.y) * a.out_width + t.x;
  const int64_t pixels = t.pixels();
  int64_t grad_stride = a.out_channels;
  const T* from = static_cast<const T*>(a.grad) + first * a.out_channels;
  const A* grad = converted(from, a.out_channels, 1, pixels * a.out_channels, s.grad, &grad_stride);
  hidden_channels_last<T>(a, t, s.hidden);
  gemm<A>().run(grad, grad_stride, static_cast<const A*>(a.point), s.product, a.channels, pixels, a.channels,
                a.out_channels, false);
  mask_row(s.product, s.hidden, static_cast<T*>(a.hidden_grad) + first * a.channels, pixels * a.channels);
  gemm<A>().pack(s.hidden, a.channels, 1, pixels, a.channels, s.packed_hidden);
  gemm<A>().run_at(grad, grad_stride, s.packed_hidden, sums, a.channels, a.out_channels, a.channels, pixels,
                   accumulate);
  A* bias = sums + a.out_channels * a.channels;
  if (!accumulate) memset(bias, 0, sizeof(A) * a.out_channels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t o = 0; o < a.out_channels; ++o) bias[o] += grad[p * grad_stride + o];
}

template <class T>
void backward_tiles(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end, void* sums_) {
  typedef compute_t<T> A;
  const BackwardScratch<A> s(a, static_cast<A*>(scratch));
  A* sums = static_cast<A*>(sums_);
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_at(a, i);
    a.channels_last ? backward_channels_last<T>(a, t, s, sums, i > begin)
                    : backward_nchw<T>(a, t, s, sums, i > begin);
  }
}

int64_t forward_scratch(const PdcBlockArgs& a) {
  return a.dtype == DType::f64 ? ForwardScratch<double>(a, nullptr).elements
                               : ForwardScratch<float>(a, nullptr).elements;
}

int64_t backward_scratch(const PdcBlockArgs& a) {
  return a.dtype == DType::f64 ? BackwardScratch<double>(a, nullptr).elements
                               : BackwardScratch<float>(a, nullptr).elements;
}

void forward(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::f32:
      return forward_tiles<float>(a, scratch, begin, end);
    case DType::f64:
      return forward_tiles<double>(a, scratch, begin, end);
    case DType::f16:
      return forward_tiles<f16>(a, scratch, begin, end);
    case DType::bf16:
      return forward_tiles<bf16>(a, scratch, begin, end);
  }
}

void backward(const PdcBlockArgs& a, void* scratch, int64_t begin, int64_t end, void* sums) {
  switch (a.dtype) {
    case DType::f32:
      return backward_tiles<float>(a, scratch, begin, end, sums);
    case DType::f64:
      return backward_tiles<double>(a, scratch, begin, end, sums);
    case DType::f16:
      return backward_tiles<f16>(a, scratch, begin, end, sums);
    case DType::bf16:
      return backward_tiles<bf16>(a, scratch, begin, end, sums);
  }
}

}  // namespace

const PdcBlockKernels& pdc_block_kernels() {
  static const PdcBlockKernels table = {forward_scratch, backward_scratch, forward, backward};
  return table;
}

}  // namespace FRD_ISA
}  // namespace frd
