// NCHW: each strip of a plane is copied into a scratch in the compute type, with its zero padding. After that
// no tap needs a bounds test, whatever the padding, stride or dilation.
#pragma once
#include "pdc/cpu/combine.h"
#include "pdc/cpu/kernel.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Half of a first-level cache.
constexpr int64_t kStripBytes = 24 * 1024;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ScratchLayout of the scratch. A row has `stride` sections; section r holds the padded columns r, r +
// stride, ..., so that the pixels that neighbouring outputs read at one tap are contiguous. Sizes are in
// elements.
struct ScratchLayout {
  int64_t section;  // length of a section
  int64_t pitch;    // length of a row
  int64_t shift;    // of column 0 in its section, which aligns the first source column
  int64_t window;   // padded rows that one output row reads
};

template <class A>
ScratchLayout scratch_layout(const PdcStencil& s) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const int64_t extent = 2 * (kernel_side(s.kind) / 2);
  ScratchLayout l;
  l.shift = s.x.stride == 1 && s.x.padding > 0 ? round_up(s.x.padding, lanes) - s.x.padding : 0;
  const int64_t read = round_up(s.x.out, lanes) + extent * s.x.dilation / s.x.stride + 1;
  const int64_t written = (s.x.padding > 0 ? s.x.padding : 0) + round_up(s.x.in, lanes) * s.x.upsample;
  const int64_t fast_written = s.x.stride == 1 ? written : 0;
  l.section = round_up(l.shift + (read > fast_written ? read : fast_written), lanes);
  l.pitch = l.section * s.x.stride;
  l.window = extent * s.y.dilation + 1;
  return l;
}

inline int64_t strip_rows(int64_t out, int64_t strips) { return (out + strips - 1) / strips; }

template <class A>
int64_t strips_of(const PdcStencil& s) {
  const ScratchLayout l = scratch_layout<A>(s);
  const int64_t cached_rows = kStripBytes / static_cast<int64_t>(sizeof(A)) / l.pitch;
  int64_t rows = cached_rows > l.window ? (cached_rows - l.window) / s.y.stride + 1 : 1;
  // In a wide image the halo must not be copied more often than the rows themselves.
  if (rows < l.window) rows = l.window;
  return s.y.out > rows ? (s.y.out + rows - 1) / rows : 1;
}

template <class A>
int64_t strip_elements_of(const PdcStencil& s, int64_t strips) {
  const ScratchLayout l = scratch_layout<A>(s);
  return ((strip_rows(s.y.out, strips) - 1) * s.y.stride + l.window) * l.pitch + Vec<A>::lanes;
}

// Copies the padded rows [first, first + rows) of plane [y.in, x.in] into the scratch. Rows of padding need
// to be cleared only if another strip has used the scratch for other rows (strips > 1); all other padding
// stays 0.
template <class T, class A>
void fill(const PdcStencil& s, const ScratchLayout& l, const T* plane, A* scratch, int64_t first,
          int64_t rows, bool clear) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const PdcAxis& y = s.y;
  const PdcAxis& x = s.x;
  for (int64_t j = 0; j < rows; ++j) {
    A* to = scratch + j * l.pitch;
    const int64_t padded_row = first + j - y.padding;
    const int64_t row = y.upsample == 1 ? padded_row : padded_row / y.upsample;
    if (padded_row < 0 || row * y.upsample != padded_row || row >= y.in) {
      if (clear) memset(to, 0, l.pitch * sizeof(A));
      continue;
    }
    const T* from = plane + row * x.in;
    if (x.stride == 1 && x.upsample == 1) {
      const int64_t cropped = x.padding < 0 ? -x.padding : 0;
      const int64_t n = x.in - cropped;
      A* start = to + l.shift + (x.padding > 0 ? x.padding : 0);
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store_vec(start + i, load_vec(from + cropped + i));
      if (i < n) store_vec(start + i, load_part(from + cropped + i, n - i));
      continue;
    }
    for (int64_t i = 0; i < x.in; ++i) {
      const int64_t column = x.padding + i * x.upsample;
      const int64_t index = column / x.stride;
      if (column >= 0 && index < l.section - l.shift) {
        to[column % x.stride * l.section + l.shift + index] = load(from[i]);
      }
    }
  }
}

// Calls f(window, row, column) for each vector of outputs.
template <PdcKind kind, class A, class F>
FRD_INLINE void each_vector(const PdcStencil& s, const ScratchLayout& l, const A* scratch, int64_t rows,
                            F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  using V = vec_t<A>;
  const int64_t columns = s.x.out;
  if (kind != PdcKind::radial && s.y.stride == 1 && s.x.stride == 1 && s.y.dilation == 1 &&
      s.x.dilation == 1) {
    // The window moves row the rows in registers: three loads per output instead of nine.
    for (int64_t c = 0; c < columns; c += lanes) {
      const A* at = scratch + l.shift + c;
      V t[9];
      for (int i = 0; i < 6; ++i) t[3 + i] = load_vec(at + i / 3 * l.pitch + i % 3);
      at += 2 * l.pitch;
      for (int64_t r = 0; r < rows; ++r, at += l.pitch) {
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) t[i] = t[3 + i];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) t[6 + i] = load_vec(at + i);
        f(t, r, c);
      }
    }
    return;
  }
  constexpr int count = slots(kind);
  int64_t offset[count];
  const int reach = kernel_side(kind) / 2;
  for (int i = 0; i < count; ++i) {
    const int64_t row = (slot_tap(kind, i).dy + reach) * s.y.dilation;
    const int64_t column = (slot_tap(kind, i).dx + reach) * s.x.dilation;
    offset[i] = row * l.pitch + column % s.x.stride * l.section + column / s.x.stride + l.shift;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += lanes) {
      const A* at = scratch + r * s.y.stride * l.pitch + c;
      V t[count];
#pragma GCC unroll 18
      for (int i = 0; i < count; ++i) t[i] = load_vec(at + offset[i]);
      f(t, r, c);
    }
  }
}

// Output rows [begin, begin + rows) of a plane; planes are counted over batch and channels.
struct Strip {
  int64_t plane, channel, begin, rows;
};
inline Strip strip_of(const PdcStencil& s, int64_t strips, int64_t index) {
  const int64_t plane = index / strips;
  const int64_t strip = index % strips;
  const int64_t begin = s.y.out * strip / strips;
  const int64_t end = s.y.out * (strip + 1) / strips;
  return {plane, plane % s.channels, begin, end - begin};
}

template <class T, class A>
void fill_strip(const PdcStencil& s, const ScratchLayout& l, const Strip& strip, A* scratch, int64_t strips) {
  const T* plane = static_cast<const T*>(s.source) + strip.plane * s.y.in * s.x.in;
  fill(s, l, plane, scratch, strip.begin * s.y.stride, (strip.rows - 1) * s.y.stride + l.window, strips > 1);
}

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]).
template <class Case, class T>
void stencil_strips(const PdcStencil& s, void* scratch_, int64_t strips, int64_t first, int64_t last) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const ScratchLayout l = scratch_layout<A>(s);
  A* scratch = static_cast<A*>(scratch_);
  const V theta = splat(static_cast<A>(s.theta));
  for (int64_t index = first; index < last; ++index) {
    const Strip strip = strip_of(s, strips, index);
    fill_strip<T>(s, l, strip, scratch, strips);
    V w[kPdcRows];
    for (int k = 0; k < kPdcRows; ++k) {
      w[k] = splat(static_cast<const A*>(s.weights)[k * s.pitch + strip.channel]);
    }
    T* out = static_cast<T*>(s.out) + (strip.plane * s.y.out + strip.begin) * s.x.out;
    each_vector<Case::kKind>(s, l, scratch, strip.rows,
                             [&](const V* t, int64_t r, int64_t c) FRD_LAMBDA_INLINE {
                               const V y = pdc_combine<Case::kKind, Case::kPure>(t, w, theta);
                               T* at = out + r * s.x.out + c;
                               if (c + lanes <= s.x.out) {
                                 store_vec(at, y);
                               } else {
                                 store_part(at, y, s.x.out - c);
                               }
                             });
  }
}

// dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy over each strip.
template <class Case, class T>
void weight_grad_strips(const PdcStencil& s, void* scratch_, int64_t strips, int64_t first, int64_t last) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const ScratchLayout l = scratch_layout<A>(s);
  A* scratch = static_cast<A*>(scratch_);
  const V theta = splat(static_cast<A>(s.theta));
  for (int64_t index = first; index < last; ++index) {
    const Strip strip = strip_of(s, strips, index);
    fill_strip<T>(s, l, strip, scratch, strips);
    V sums[kPdcRows] = {};
    const T* grad = static_cast<const T*>(s.grad) + (strip.plane * s.y.out + strip.begin) * s.x.out;
    each_vector<Case::kKind>(s, l, scratch, strip.rows,
                             [&](const V* t, int64_t r, int64_t c) FRD_LAMBDA_INLINE {
                               const T* at = grad + r * s.x.out + c;
                               if (c + lanes <= s.x.out) {
                                 pdc_correlate<Case::kKind, Case::kPure>(sums, t, load_vec(at), theta);
                                 return;
                               }
                               // Beyond the row the scratch may hold infinities, and 0 * inf is NaN.
                               V inside[slots(Case::kKind)];
                               for (int i = 0; i < slots(Case::kKind); ++i)
                                 inside[i] = first_lanes<A>(t[i], s.x.out - c);
                               const V g = load_part(at, s.x.out - c);
                               pdc_correlate<Case::kKind, Case::kPure>(sums, inside, g, theta);
                             });
    A* to = static_cast<A*>(s.sums) + index * kPdcRows;
    for (int k = 0; k < kPdcRows; ++k) to[k] = sum_lanes(sums[k]);
  }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
