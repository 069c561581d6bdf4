// NCHW: a strip of a plane is copied once into a scratch with its zeros around it, in the compute type; after
// that no tap needs a bounds test, whatever padding, stride or dilation.
#pragma once
#include "pdc/cpu/combine.h"
#include "pdc/cpu/kernel.h"

namespace frd {
namespace FRD_ISA {
namespace {

constexpr int64_t kStripBytes = 24 * 1024;  // half of a first-level cache

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Scratch row: `step` sections, section r holding every step-th padded column from r on, so that the pixels
// that neighbouring outputs read at one tap are neighbours.
struct Layout {
  int64_t section, pitch;  // elements
  int64_t shift;           // of column 0 inside a section: makes the first source column aligned
  int64_t window;          // padded rows of a window
};

template <class A>
Layout layout_of(const PdcStencil& s) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const int64_t span = 2 * (kernel_side(s.kind) / 2);
  Layout l;
  l.shift = s.x.step == 1 && s.x.lead > 0 ? round_up(s.x.lead, lanes) - s.x.lead : 0;
  const int64_t read = round_up(s.x.out, lanes) + span * s.x.dilation / s.x.step + 1;
  const int64_t written = (s.x.lead > 0 ? s.x.lead : 0) + round_up(s.x.source, lanes) * s.x.insert;
  const int64_t fast_written = s.x.step == 1 ? written : 0;
  l.section = round_up(l.shift + (read > fast_written ? read : fast_written), lanes);
  l.pitch = l.section * s.x.step;
  l.window = span * s.y.dilation + 1;
  return l;
}

inline int64_t strip_rows(int64_t out, int64_t strips) { return (out + strips - 1) / strips; }

template <class A>
int64_t strips_of(const PdcStencil& s) {
  const Layout l = layout_of<A>(s);
  const int64_t affordable = kStripBytes / static_cast<int64_t>(sizeof(A)) / l.pitch;
  int64_t rows = affordable > l.window ? (affordable - l.window) / s.y.step + 1 : 1;
  if (rows < l.window)
    rows = l.window;  // a strip of a wide image: do not copy the halo more often than the rows
  return s.y.out > rows ? (s.y.out + rows - 1) / rows : 1;
}

template <class A>
int64_t strip_elements_of(const PdcStencil& s, int64_t strips) {
  const Layout l = layout_of<A>(s);
  return ((strip_rows(s.y.out, strips) - 1) * s.y.step + l.window) * l.pitch + Vec<A>::lanes;
}

// Copies the padded rows [first, first + rows) of a plane. Rows outside are zeroed only where a scratch meets
// other rows than last time (strips > 1): all else that is 0 stays 0.
template <class T, class A>
void fill(const PdcStencil& s, const Layout& l, const T* plane, A* scratch, int64_t first, int64_t rows,
          bool clear) {
  constexpr int64_t lanes = Vec<A>::lanes;
  const PdcAxis &y = s.y, &x = s.x;
  for (int64_t j = 0; j < rows; ++j) {
    A* to = scratch + j * l.pitch;
    const int64_t at = first + j - y.lead, row = y.insert == 1 ? at : at / y.insert;
    if (at < 0 || row * y.insert != at || row >= y.source) {
      if (clear) memset(to, 0, l.pitch * sizeof(A));
      continue;
    }
    const T* from = plane + row * x.source;
    if (x.step == 1 && x.insert == 1) {
      const int64_t skip = x.lead < 0 ? -x.lead : 0, n = x.source - skip;
      A* start = to + l.shift + (x.lead > 0 ? x.lead : 0);
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store_vec(start + i, load_vec(from + skip + i));
      if (i < n) store_vec(start + i, load_part(from + skip + i, n - i));
      continue;
    }
    for (int64_t i = 0; i < x.source; ++i) {
      const int64_t column = x.lead + i * x.insert, index = column / x.step;
      if (column >= 0 && index < l.section - l.shift) {
        to[column % x.step * l.section + l.shift + index] = load(from[i]);
      }
    }
  }
}

// Calls f(t, r, c, full) for each vector of outputs, t = the pixels of its window.
template <PdcKind kind, class A, class F>
FRD_INLINE void each_vector(const PdcStencil& s, const Layout& l, const A* scratch, int64_t rows, F f) {
  constexpr int64_t lanes = Vec<A>::lanes;
  using V = vec_t<A>;
  const int64_t columns = s.x.out;
  if (kind != PdcKind::radial && s.y.step == 1 && s.x.step == 1 && s.y.dilation == 1 && s.x.dilation == 1) {
    // Down the rows with the window in registers: three loads an output instead of nine.
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
    const int64_t down = (slot_tap(kind, i).dy + reach) * s.y.dilation;
    const int64_t right = (slot_tap(kind, i).dx + reach) * s.x.dilation;
    offset[i] = down * l.pitch + right % s.x.step * l.section + right / s.x.step + l.shift;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += lanes) {
      const A* at = scratch + r * s.y.step * l.pitch + c;
      V t[count];
#pragma GCC unroll 18
      for (int i = 0; i < count; ++i) t[i] = load_vec(at + offset[i]);
      f(t, r, c);
    }
  }
}

struct Strip {
  int64_t plane, channel, begin, rows;
};
inline Strip strip_of(const PdcStencil& s, int64_t strips, int64_t item) {
  const int64_t plane = item / strips, index = item % strips;
  const int64_t begin = s.y.out * index / strips, end = s.y.out * (index + 1) / strips;
  return {plane, plane % s.channels, begin, end - begin};
}

template <class T, class A>
void fill_strip(const PdcStencil& s, const Layout& l, const Strip& strip, A* scratch, int64_t strips) {
  const T* plane = static_cast<const T*>(s.source) + strip.plane * s.y.source * s.x.source;
  fill(s, l, plane, scratch, strip.begin * s.y.step, (strip.rows - 1) * s.y.step + l.window, strips > 1);
}

template <class Case, class T>
void stencil_strips(const PdcStencil& s, void* scratch_, int64_t strips, int64_t first, int64_t last) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const Layout l = layout_of<A>(s);
  A* scratch = static_cast<A*>(scratch_);
  const V theta = splat(static_cast<A>(s.theta));
  for (int64_t item = first; item < last; ++item) {
    const Strip strip = strip_of(s, strips, item);
    fill_strip<T>(s, l, strip, scratch, strips);
    V w[kPdcRows];
    for (int k = 0; k < kPdcRows; ++k) {
      w[k] = splat(static_cast<const A*>(s.weights)[k * s.pitch + strip.channel]);
    }
    T* out = static_cast<T*>(s.out) + (strip.plane * s.y.out + strip.begin) * s.x.out;
    each_vector<Case::kKind>(s, l, scratch, strip.rows,
                             [&](const V* t, int64_t r, int64_t c) FRD_LAMBDA_INLINE {
                               const V y = combine<Case::kKind, Case::kPure>(t, w, theta);
                               T* at = out + r * s.x.out + c;
                               if (c + lanes <= s.x.out) {
                                 store_vec(at, y);
                               } else {
                                 store_part(at, y, s.x.out - c);
                               }
                             });
  }
}

template <class Case, class T>
void sums_strips(const PdcStencil& s, void* scratch_, int64_t strips, int64_t first, int64_t last) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const Layout l = layout_of<A>(s);
  A* scratch = static_cast<A*>(scratch_);
  const V theta = splat(static_cast<A>(s.theta));
  for (int64_t item = first; item < last; ++item) {
    const Strip strip = strip_of(s, strips, item);
    fill_strip<T>(s, l, strip, scratch, strips);
    V sums[kPdcRows] = {};
    const T* grad = static_cast<const T*>(s.grad) + (strip.plane * s.y.out + strip.begin) * s.x.out;
    each_vector<Case::kKind>(s, l, scratch, strip.rows,
                             [&](const V* t, int64_t r, int64_t c) FRD_LAMBDA_INLINE {
                               const T* at = grad + r * s.x.out + c;
                               if (c + lanes <= s.x.out) {
                                 correlate<Case::kKind, Case::kPure>(sums, t, load_vec(at), theta);
                                 return;
                               }
                               // What stands beyond the row may be infinite, and 0 times that no 0.
                               V inside[slots(Case::kKind)];
                               for (int i = 0; i < slots(Case::kKind); ++i)
                                 inside[i] = first_lanes<A>(t[i], s.x.out - c);
                               const V g = load_part(at, s.x.out - c);
                               correlate<Case::kKind, Case::kPure>(sums, inside, g, theta);
                             });
    A* to = static_cast<A*>(s.sums) + item * kPdcRows;
    for (int k = 0; k < kPdcRows; ++k) to[k] = sum_lanes(sums[k]);
  }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
