// What becomes of the sums of a tile: bias, residual or gate, one rounding, the store.
#pragma once
#include "pdc_block/block_shape.cuh"

namespace frd {

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Elements {
  T at[kCount];
};

// v += from[i], or v = 0 where from[i] <= 0 (a NaN lets v pass); `count` of kVector elements are there
template <bool kGate, class T, int kVector>
FRD_DEVICE void combine_with(float (&v)[kVector], const T* from, int count, bool wide) {
  Elements<T, kVector> e{};
  if (wide) {
    e = *reinterpret_cast<const Elements<T, kVector>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) e.at[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if constexpr (kGate)
      v[i] = load(e.at[i]) <= 0 ? 0.f : v[i];
    else
      v[i] += load(e.at[i]);
  }
}

template <class T, int kVector>
FRD_DEVICE void store_vector(T* to, const float (&v)[kVector], int count, bool wide) {
  Elements<T, kVector> e;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) {
      const uint32_t both = pack<T>(v[i], v[i + 1]);
      e.at[i].bits = static_cast<uint16_t>(both), e.at[i + 1].bits = static_cast<uint16_t>(both >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) e.at[i] = v[i];
  }
  if (wide) {
    *reinterpret_cast<Elements<T, kVector>*>(to) = e;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) to[i] = e.at[i];
  }
}

// Columns `column` on of row `row` of the product of a tile.
template <class S, int kVector>
FRD_DEVICE void finish_vector(const BlockProduct& a, const TilePlace& place, int first_out, int row,
                              int column, float (&v)[kVector]) {
  using T = typename S::T;
  const int pixel = S::kPixels ? row : column, out = first_out + (S::kPixels ? column : row);
  const int y = place.y + pixel / S::Tile::kColumns, x = place.x + pixel % S::Tile::kColumns;
  if (y >= a.out_height || x >= a.out_width || out >= a.out_channels) return;
  const int left = S::kPixels ? a.out_channels - out : a.out_width - x,
            count = left < kVector ? left : kVector;
  const int64_t image = place.image * a.out_channels * a.out_height * a.out_width;
  const int64_t at = image + (S::kPixels ? (y * a.out_width + x) * a.out_channels + out
                                         : (out * a.out_height + y) * a.out_width + x);
  if (a.point_bias) {
    const T* bias = static_cast<const T*>(a.point_bias) + out;
    if constexpr (S::kPixels) {
      combine_with<false>(v, bias, count, a.wide_out);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += load(*bias);
    }
  }
  if (a.residual) combine_with<false>(v, static_cast<const T*>(a.residual) + at, count, a.wide_out);
  if (a.gate) combine_with<true>(v, static_cast<const T*>(a.gate) + at, count, a.wide_out);
  store_vector(static_cast<T*>(a.out) + at, v, count, a.wide_out);
}

}  // namespace frd
