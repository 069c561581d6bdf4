// The hidden values relu(stencil(x)) of one tile, in the compute type. Only for kernel.cpp.
#pragma once
#include "core/vec.h"
#include "pdc/taps.h"
#include "pdc_block/cpu/kernel.h"

namespace frd {

template <PdcKind kind, bool pure, int k, class V, class Weight, class At>
static inline __attribute__((always_inline)) void add_pdc_terms(V& sum, V theta, const Weight& weight,
                                                                const At& at) {
  if constexpr (k < kPdcWeights) {
    constexpr Tap plus = plus_tap(kind, k);
    constexpr Tap minus = minus_tap(kind, k);
    if constexpr (kind == PdcKind::vanilla) {
      sum += weight(k) * at(plus);
    } else if constexpr (!pure) {
      sum += weight(k) * (at(plus) - theta * at(minus));
    } else if constexpr (plus.dy != minus.dy || plus.dx != minus.dx) {
      // Otherwise the term is x - x.
      sum += weight(k) * (at(plus) - at(minus));
    }
    add_pdc_terms<kind, pure, k + 1>(sum, theta, weight, at);
  }
}

// start + sum_k w_k (x[plus_k] - theta x[minus_k]), the difference first, k ascending; pure: theta == 1. V is
// float, double or a vector of them; weight(int) and at(Tap) return a V.
template <PdcKind kind, bool pure, class V, class Weight, class At>
static inline __attribute__((always_inline)) V pdc_sum(V start, V theta, const Weight& weight, const At& at) {
  add_pdc_terms<kind, pure, 0>(start, theta, weight, at);
  return start;
}

namespace FRD_ISA {
namespace {

// The interface of Vec for a single element.
template <class A>
struct Lane {
  static constexpr int lanes = 1;
  typedef A type;
  template <class T>
  FRD_INLINE type load(const T* p) {
    return frd::load(*p);
  }
  template <class T>
  FRD_INLINE void store(T* p, type v) {
    frd::store(*p, v);
  }
};

// Pixels of the output.
struct Tile {
  int64_t image, y, x, rows, columns;
  int64_t pixels() const { return rows * columns; }
};

Tile tile_at(const PdcBlockArgs& a, int64_t index) {
  const int64_t tx = index % a.tiles_x;
  const int64_t ty = index / a.tiles_x % a.tiles_y;
  Tile t{index / a.tiles_x / a.tiles_y, ty * a.tile_rows, tx * a.tile_columns, a.tile_rows, a.tile_columns};
  if (t.rows > a.out_height - t.y) t.rows = a.out_height - t.y;
  if (t.columns > a.out_width - t.x) t.columns = a.out_width - t.x;
  return t;
}

int64_t reach(const PdcBlockArgs& a) { return kernel_side(a.kind) / 2; }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The part of x that a tile reads, with zeros outside the image.
struct Window {
  int64_t rows, pitch;
};

Window window_of(const PdcBlockArgs& a, int64_t rows, int64_t columns) {
  return {(rows - 1) * a.stride_y + 1 + 2 * reach(a) * a.dilation_y,
          (columns - 1) * a.stride_x + 1 + 2 * reach(a) * a.dilation_x};
}

int64_t staged_elements(const PdcBlockArgs& a, int64_t lanes) {
  const Window w = window_of(a, a.tile_rows, a.tile_columns);
  return round_up(w.rows * w.pitch, lanes) + lanes;
}

// Keeps NaN, like torch.
template <class V>
FRD_INLINE V relu(V v) {
  return v <= V{} ? V{} : v;
}

// line[i] = relu(bias + sum_k w_k (x[plus_k] - theta x[minus_k])) of the window that starts at staged[i], for
// i < n rounded up to whole vectors; weights [10].
template <PdcKind kind, bool pure, class A>
void stencil_line(const PdcBlockArgs& a, const A* staged, int64_t pitch, const A* weights, A* line,
                  int64_t n) {
  typedef typename Vec<A>::type V;
  const V bias = V{} + weights[kPdcWeights], theta = V{} + static_cast<A>(a.theta);
  const int64_t step_y = pitch * a.dilation_y;
  const int64_t step_x = a.dilation_x;
  const A* centre = staged + kernel_side(kind) / 2 * (step_y + step_x);
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) {
    const auto weight = [&](int k) __attribute__((always_inline)) { return V{} + weights[k]; };
    const auto tap = [&](Tap t) __attribute__((always_inline)) {
      return Vec<A>::load(centre + i + t.dy * step_y + t.dx * step_x);
    };
    Vec<A>::store(line + i, relu(pdc_sum<kind, pure>(bias, theta, weight, tap)));
  }
}

template <class A>
using StencilLine = void (*)(const PdcBlockArgs&, const A*, int64_t, const A*, A*, int64_t);

template <class A>
StencilLine<A> stencil_line_for(PdcKind kind, bool pure) {
  switch (kind) {
    case PdcKind::central:
      return pure ? stencil_line<PdcKind::central, true, A> : stencil_line<PdcKind::central, false, A>;
    case PdcKind::angular:
      return pure ? stencil_line<PdcKind::angular, true, A> : stencil_line<PdcKind::angular, false, A>;
    case PdcKind::radial:
      return pure ? stencil_line<PdcKind::radial, true, A> : stencil_line<PdcKind::radial, false, A>;
    default:
      return stencil_line<PdcKind::vanilla, true, A>;
  }
}

// Converts n elements.
template <class T>
void copy_row(const T* from, compute_t<T>* to, int64_t n) {
  typedef Vec<compute_t<T>> V;
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::store(to + i, V::load(from + i));
  for (; i < n; ++i) to[i] = load(from[i]);
}

// NCHW: hidden [C, stride] of the tile's pixels; each row is written up to a vector beyond its end. staged
// and line have staged_elements() each.
template <class T>
void hidden_nchw(const PdcBlockArgs& a, const Tile& t, compute_t<T>* staged, compute_t<T>* line,
                 compute_t<T>* hidden, int64_t stride) {
  typedef compute_t<T> A;
  const Window w = window_of(a, t.rows, t.columns);
  const int64_t top = t.y * a.stride_y - reach(a) * a.dilation_y;
  const int64_t left = t.x * a.stride_x - reach(a) * a.dilation_x;
  const int64_t first = left < 0 ? 0 : left;
  const int64_t last = left + w.pitch < a.width ? left + w.pitch : a.width;
  const bool dense = a.stride_y == 1 && a.stride_x == 1;
  const StencilLine<A> stencil = stencil_line_for<A>(a.kind, a.pure);
  memset(staged, 0, sizeof(A) * staged_elements(a, Vec<A>::lanes));
  for (int64_t c = 0; c < a.channels; ++c) {
    const T* plane = static_cast<const T*>(a.x) + (t.image * a.channels + c) * a.height * a.width;
    const A* weights = static_cast<const A*>(a.stencil) + c * kStencilRow;
    for (int64_t r = 0; r < w.rows; ++r)
      if (top + r >= 0 && top + r < a.height)
        copy_row(plane + (top + r) * a.width + first, staged + r * w.pitch + first - left, last - first);
    if (dense) stencil(a, staged, w.pitch, weights, line, (t.rows - 1) * w.pitch + t.columns);
    A* out = hidden + c * stride;
    for (int64_t r = 0; r < t.rows; ++r, out += t.columns) {
      if (dense) {
        for (int64_t i = 0; i < t.columns; i += Vec<A>::lanes)
          Vec<A>::store(out + i, Vec<A>::load(line + r * w.pitch + i));
      } else {
        stencil(a, staged + r * a.stride_y * w.pitch, w.pitch, weights, line,
                (t.columns - 1) * a.stride_x + 1);
        for (int64_t i = 0; i < t.columns; ++i) out[i] = line[i * a.stride_x];
      }
    }
  }
}

// channels_last: channels [c, c + lanes) of hidden [pixels, C].
template <class L, PdcKind kind, bool pure, class T>
void hidden_lanes(const PdcBlockArgs& a, const Tile& t, int64_t c, compute_t<T>* hidden) {
  typedef compute_t<T> A;
  typedef typename L::type V;
  constexpr int kReach = kernel_side(kind) / 2;
  static const T zeros[L::lanes] = {};
  const A* prepared = static_cast<const A*>(a.stencil) + c;
  V weights[kStencilRow];
  for (int k = 0; k < kStencilRow; ++k) weights[k] = L::load(prepared + k * a.channels);
  const V theta = V{} + static_cast<A>(a.theta);
  const auto weight = [&](int k) __attribute__((always_inline)) { return weights[k]; };
  const T* image = static_cast<const T*>(a.x) + t.image * a.height * a.width * a.channels + c;
  A* out = hidden + c;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* rows[2 * kReach + 1];
    // From pixel to pixel; 0 in a row outside the image, which reads zeros.
    int64_t steps[2 * kReach + 1];
    for (int d = -kReach; d <= kReach; ++d) {
      const int64_t y = (t.y + r) * a.stride_y + d * a.dilation_y;
      const bool inside = y >= 0 && y < a.height;
      rows[d + kReach] = inside ? image + y * a.width * a.channels : zeros;
      steps[d + kReach] = inside ? a.channels : 0;
    }
    for (int64_t i = 0; i < t.columns; ++i, out += a.channels) {
      const int64_t x = (t.x + i) * a.stride_x;
      const auto tap = [&](Tap o) __attribute__((always_inline)) {
        return L::load(rows[o.dy + kReach] + (x + o.dx * a.dilation_x) * steps[o.dy + kReach]);
      };
      const auto edge_tap = [&](Tap o) __attribute__((always_inline)) {
        const int64_t at = x + o.dx * a.dilation_x;
        return at >= 0 && at < a.width ? tap(o) : V{};
      };
      const bool interior = x >= kReach * a.dilation_x && x + kReach * a.dilation_x < a.width;
      const V sum = interior ? pdc_sum<kind, pure>(weights[kPdcWeights], theta, weight, tap)
                             : pdc_sum<kind, pure>(weights[kPdcWeights], theta, weight, edge_tap);
      L::store(out, relu(sum));
    }
  }
}

template <PdcKind kind, bool pure, class T>
void hidden_channels(const PdcBlockArgs& a, const Tile& t, compute_t<T>* hidden) {
  typedef Vec<compute_t<T>> V;
  if (a.channels < V::lanes) {
    for (int64_t c = 0; c < a.channels; ++c) hidden_lanes<Lane<compute_t<T>>, kind, pure, T>(a, t, c, hidden);
    return;
  }
  // The last vector overlaps the one before.
  for (int64_t c = 0; c < a.channels; c += V::lanes)
    hidden_lanes<V, kind, pure, T>(a, t, c + V::lanes <= a.channels ? c : a.channels - V::lanes, hidden);
}

// channels_last: hidden [pixels, C].
template <class T>
void hidden_channels_last(const PdcBlockArgs& a, const Tile& t, compute_t<T>* hidden) {
  switch (a.kind) {
    case PdcKind::central:
      return a.pure ? hidden_channels<PdcKind::central, true, T>(a, t, hidden)
                    : hidden_channels<PdcKind::central, false, T>(a, t, hidden);
    case PdcKind::angular:
      return a.pure ? hidden_channels<PdcKind::angular, true, T>(a, t, hidden)
                    : hidden_channels<PdcKind::angular, false, T>(a, t, hidden);
    case PdcKind::radial:
      return a.pure ? hidden_channels<PdcKind::radial, true, T>(a, t, hidden)
                    : hidden_channels<PdcKind::radial, false, T>(a, t, hidden);
    default:
      return hidden_channels<PdcKind::vanilla, true, T>(a, t, hidden);
  }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
