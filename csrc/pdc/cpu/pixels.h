// channels_last: vectors run over the channels; a tile of pixels shares the weights it has loaded.
#pragma once
#include "pdc/cpu/combine.h"
#include "pdc/cpu/kernel.h"

namespace frd {
namespace FRD_ISA {
namespace {

constexpr int kTile = 8;  // pixels

// Element index on an axis that output q reads at offset o, or -1.
inline int64_t source_index(const PdcAxis& a, int64_t q, int64_t o) {
  const int64_t at = q * a.step + o - a.lead;
  if (a.insert == 1) return at >= 0 && at < a.source ? at : -1;
  return at >= 0 && at % a.insert == 0 && at / a.insert < a.source ? at / a.insert : -1;
}

inline bool dense_window(const PdcStencil& s) {
  return s.kind != PdcKind::radial && s.y.step == 1 && s.x.step == 1 && s.y.insert == 1 && s.x.insert == 1 &&
         s.y.dilation == 1 && s.x.dilation == 1;
}

// Pointers to the pixels a tile reads, those outside at a row of zeros.
template <class T>
struct Dense {  // windows overlap: 3 rows of kTile + 2 pixels
  const T* at[kTile + 2][3];
};
template <class T, int n>
struct Scattered {  // each pixel has its own n
  const T* at[kTile][n];
};

template <class T>
void locate(const PdcStencil& s, const T* image, const T* zeros, int64_t r, int64_t x, int count,
            Dense<T>& p) {
  for (int i = 0; i < 3; ++i) {
    const int64_t row = source_index(s.y, r, i);
    for (int j = 0; j < count + 2; ++j) {
      const int64_t column = source_index(s.x, x, j);
      p.at[j][i] = row < 0 || column < 0 ? zeros : image + (row * s.x.source + column) * s.channels;
    }
  }
}

template <PdcKind kind, class T>
void locate(const PdcStencil& s, const T* image, const T* zeros, int64_t r, int64_t x, int count,
            Scattered<T, slots(kind)>& p) {
  const int reach = kernel_side(kind) / 2;
  for (int i = 0; i < slots(kind); ++i) {
    const Tap tap = slot_tap(kind, i);
    const int64_t row = source_index(s.y, r, (tap.dy + reach) * s.y.dilation);
    for (int j = 0; j < count; ++j) {
      const int64_t column = source_index(s.x, x + j, (tap.dx + reach) * s.x.dilation);
      p.at[j][i] = row < 0 || column < 0 ? zeros : image + (row * s.x.source + column) * s.channels;
    }
  }
}

// Calls f(t, j) for each pixel j of a tile, t = its window at channel c; n channels are left.
template <bool full, class T, class F>
FRD_INLINE void each_pixel(const Dense<T>& p, int count, int64_t c, int64_t n, F f) {
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
FRD_INLINE void each_pixel(const Scattered<T, slot_count>& p, int count, int64_t c, int64_t n, F f) {
  for (int j = 0; j < count; ++j) {
    vec_t<compute_t<T>> t[slot_count];
#pragma GCC unroll 18
    for (int i = 0; i < slot_count; ++i) t[i] = load_lanes<full>(p.at[j][i] + c, n);
    f(t, j);
  }
}

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
    store_lanes<full>(out + j * s.channels + c, combine<Case::kKind, Case::kPure>(t, w, theta), n);
  });
}

template <class Case, bool full, class T, class Pointers>
FRD_INLINE void sums_lanes(const PdcStencil& s, const Pointers& p, const T* grad, compute_t<T>* sums,
                           int count, int64_t c) {
  using A = compute_t<T>;
  using V = vec_t<A>;
  const int64_t n = s.channels - c;
  V acc[kPdcRows];
#pragma GCC unroll 10
  for (int k = 0; k < kPdcRows; ++k) acc[k] = load_vec(sums + k * s.pitch + c);
  const V theta = splat(static_cast<A>(s.theta));
  each_pixel<full>(p, count, c, n, [&](const V* t, int j) FRD_LAMBDA_INLINE {
    correlate<Case::kKind, Case::kPure>(acc, t, load_lanes<full>(grad + j * s.channels + c, n), theta);
  });
#pragma GCC unroll 10
  for (int k = 0; k < kPdcRows; ++k) store_vec(sums + k * s.pitch + c, acc[k]);
}

// Calls f(pointers, r, x, count) for each tile of rows [begin, end).
template <class Case, class T, class F>
FRD_INLINE void each_tile(const PdcStencil& s, const void* zeros_, int64_t image, int64_t begin, int64_t end,
                          F f) {
  const T* zeros = static_cast<const T*>(zeros_);
  const T* source = static_cast<const T*>(s.source) + image * s.y.source * s.x.source * s.channels;
  const bool dense = dense_window(s);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t x = 0; x < s.x.out; x += kTile) {
      const int count = s.x.out - x < kTile ? static_cast<int>(s.x.out - x) : kTile;
      if constexpr (Case::kKind != PdcKind::radial) {
        if (dense) {
          Dense<T> p;
          locate(s, source, zeros, r, x, count, p);
          f(p, r, x, count);
          continue;
        }
      }
      Scattered<T, slots(Case::kKind)> p;
      locate<Case::kKind>(s, source, zeros, r, x, count, p);
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
void sums_rows(const PdcStencil& s, const void* zeros, int64_t image, int64_t begin, int64_t end,
               int64_t item) {
  using A = compute_t<T>;
  constexpr int64_t lanes = Vec<A>::lanes;
  const T* grad = static_cast<const T*>(s.grad) + image * s.y.out * s.x.out * s.channels;
  A* sums = static_cast<A*>(s.sums) + item * kPdcRows * s.pitch;
  each_tile<Case, T>(s, zeros, image, begin, end, [&](const auto& p, int64_t r, int64_t x, int count) {
    const T* from = grad + (r * s.x.out + x) * s.channels;
    int64_t c = 0;
    for (; c + lanes <= s.channels; c += lanes) sums_lanes<Case, true>(s, p, from, sums, count, c);
    if (c < s.channels) sums_lanes<Case, false>(s, p, from, sums, count, c);
  });
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
