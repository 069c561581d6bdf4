// channels_last: vectors run along the channels, and the pixels of a tile share the loaded weights.
#pragma once
#include "pdc/cpu/combine.h"
#include "pdc/cpu/kernel.h"

namespace frd {
namespace FRD_ISA {
namespace {

// Pixels of a tile.
constexpr int kTile = 8;

// The input element that output q reads at offset o (PdcAxis), or -1 if it reads zero.
inline int64_t source_index(const PdcAxis& a, int64_t q, int64_t o) {
  const int64_t at = q * a.stride + o - a.padding;
  if (a.upsample == 1) return at >= 0 && at < a.in ? at : -1;
  return at >= 0 && at % a.upsample == 0 && at / a.upsample < a.in ? at / a.upsample : -1;
}

inline bool dense_window(const PdcStencil& s) {
  return s.kind != PdcKind::radial && s.y.stride == 1 && s.x.stride == 1 && s.y.upsample == 1 &&
         s.x.upsample == 1 && s.y.dilation == 1 && s.x.dilation == 1;
}

// Pointers to the pixels that a tile reads; those outside the image point to a row of zeros.
// DenseWindows: 3x3 windows that overlap, 3 rows of kTile + 2 pixels. ScatteredWindows: n pixels per output.
template <class T>
struct DenseWindows {
  const T* at[kTile + 2][3];
};
template <class T, int n>
struct ScatteredWindows {
  const T* at[kTile][n];
};

template <class T>
void locate_windows(const PdcStencil& s, const T* image, const T* zeros, int64_t r, int64_t x, int count,
                    DenseWindows<T>& p) {
  for (int i = 0; i < 3; ++i) {
    const int64_t row = source_index(s.y, r, i);
    for (int j = 0; j < count + 2; ++j) {
      const int64_t column = source_index(s.x, x, j);
      p.at[j][i] = row < 0 || column < 0 ? zeros : image + (row * s.x.in + column) * s.channels;
    }
  }
}

template <PdcKind kind, class T>
void locate_windows(const PdcStencil& s, const T* image, const T* zeros, int64_t r, int64_t x, int count,
                    ScatteredWindows<T, slots(kind)>& p) {
  const int reach = kernel_side(kind) / 2;
  for (int i = 0; i < slots(kind); ++i) {
    const Tap tap = slot_tap(kind, i);
    const int64_t row = source_index(s.y, r, (tap.dy + reach) * s.y.dilation);
    for (int j = 0; j < count; ++j) {
      const int64_t column = source_index(s.x, x + j, (tap.dx + reach) * s.x.dilation);
      p.at[j][i] = row < 0 || column < 0 ? zeros : image + (row * s.x.in + column) * s.channels;
    }
  }
}

// Calls f(window, j) for each pixel j of a tile, with the window's channels dy c on; n channels remain.
template <bool full, class T, class F>
FRD_INLINE void each_pixel(const DenseWindows<T>& p, int count, int64_t c, int64_t n, F f) {
  using V = vec_t<compute_t<T>>;
  V t[9];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    t[3 * i + 1] = load_lanes<full>(p.at[0][i] + c, n);
    t[3 * i + 2] = load_lanes<full>(p.at[1][i] + c, n);
  }
  for (int j = 0; j < count; ++j) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      t[3 * i] = t[3 * i + 1];
      t[3 * i + 1] = t[3 * i + 2];
      t[3 * i + 2] = load_lanes<full>(p.at[j + 2][i] + c, n);
    }
    f(t, j);
  }
}
template <bool full, class T, int slot_count, class F>
FRD_INLINE void each_pixel(const ScatteredWindows<T, slot_count>& p, int count, int64_t c, int64_t n, F f) {
  for (int j = 0; j < count; ++j) {
    vec_t<compute_t<T>> t[slot_count];
#pragma GCC unroll 18
    for (int i = 0; i < slot_count; ++i) t[i] = load_lanes<full>(p.at[j][i] + c, n);
    f(t, j);
  }
}

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]) of a tile, channels dy c on.
template <class Case, bool full, class T, class Pointers>
FRD_INLINE void stencil_lanes(const PdcStencil& s, const Pointers& p, T* out, int count, int64_t c) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  const int64_t n = s.channels - c;
  const A* weights = static_cast<const A*>(s.weights) + c;
  V w[kPdcRows];
#pragma GCC unroll 10
  for (int k = 0; k < kPdcRows; ++k) w[k] = load_vec(weights + k * s.pitch);
  const V theta = splat(static_cast<A>(s.theta));
  each_pixel<full>(p, count, c, n, [&](const V* t, int j) FRD_LAMBDA_INLINE {
    store_lanes<full>(out + j * s.channels + c, pdc_combine<Case::kKind, Case::kPure>(t, w, theta), n);
  });
}

// dw_k += dy (x[plus_k] - theta x[minus_k]), db += dy of a tile, channels dy c on.
template <class Case, bool full, class T, class Pointers>
FRD_INLINE void weight_grad_lanes(const PdcStencil& s, const Pointers& p, const T* grad, compute_t<T>* sums,
                                  int count, int64_t c) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  const int64_t n = s.channels - c;
  V dw[kPdcRows];
#pragma GCC unroll 10
  for (int k = 0; k < kPdcRows; ++k) dw[k] = load_vec(sums + k * s.pitch + c);
  const V theta = splat(static_cast<A>(s.theta));
  each_pixel<full>(p, count, c, n, [&](const V* t, int j) FRD_LAMBDA_INLINE {
    pdc_correlate<Case::kKind, Case::kPure>(dw, t, load_lanes<full>(grad + j * s.channels + c, n), theta);
  });
#pragma GCC unroll 10
  for (int k = 0; k < kPdcRows; ++k) store_vec(sums + k * s.pitch + c, dw[k]);
}

// Calls f(pointers, row, x, count) for each tile of rows [begin, end).
template <class Case, class T, class F>
FRD_INLINE void each_tile(const PdcStencil& s, const void* zeros_, int64_t image, int64_t begin, int64_t end,
                          F f) {
  const T* zeros = static_cast<const T*>(zeros_);
  const T* source = static_cast<const T*>(s.source) + image * s.y.in * s.x.in * s.channels;
  const bool dense = dense_window(s);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t x = 0; x < s.x.out; x += kTile) {
      const int count = s.x.out - x < kTile ? static_cast<int>(s.x.out - x) : kTile;
      if constexpr (Case::kKind != PdcKind::radial) {
        if (dense) {
          DenseWindows<T> p;
          locate_windows(s, source, zeros, r, x, count, p);
          f(p, r, x, count);
          continue;
        }
      }
      ScatteredWindows<T, slots(Case::kKind)> p;
      locate_windows<Case::kKind>(s, source, zeros, r, x, count, p);
      f(p, r, x, count);
    }
  }
}

template <class Case, class T>
void stencil_rows(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vec<compute_t<T>>::lanes;
  T* out = static_cast<T*>(s.out) + image * s.y.out * s.x.out * s.channels;
  each_tile<Case, T>(s, zeros, image, begin, end, [&](const auto& p, int64_t r, int64_t x, int count) {
    T* to = out + (r * s.x.out + x) * s.channels;
    int64_t c = 0;
    for (; c + lanes <= s.channels; c += lanes) stencil_lanes<Case, true>(s, p, to, count, c);
    if (c < s.channels) stencil_lanes<Case, false>(s, p, to, count, c);
  });
}

template <class Case, class T>
void weight_grad_rows(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end,
                      int64_t part) {
  using A = compute_t<T>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const T* grad = static_cast<const T*>(s.grad) + image * s.y.out * s.x.out * s.channels;
  A* sums = static_cast<A*>(s.sums) + part * kPdcRows * s.pitch;
  each_tile<Case, T>(s, zeros, image, begin, end, [&](const auto& p, int64_t r, int64_t x, int count) {
    const T* dy = grad + (r * s.x.out + x) * s.channels;
    int64_t c = 0;
    for (; c + lanes <= s.channels; c += lanes) weight_grad_lanes<Case, true>(s, p, dy, sums, count, c);
    if (c < s.channels) weight_grad_lanes<Case, false>(s, p, dy, sums, count, c);
  });
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
