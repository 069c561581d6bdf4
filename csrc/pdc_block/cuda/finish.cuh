// What becomes of the sums of a tile: bias, residual or gate, one rounding, the store.
#pragma once
#include "pdc_block/cuda/shape.cuh"

namespace frd {

// kVector consecutive elements, as words.
template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Vector {
  static constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
};

template <class T, int kVector>
FRD_DEVICE void unpack_vector(const Vector<T, kVector>& from, float (&v)[kVector]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) unpack<T>(from.words[i / 2], v[i], v[i + 1]);
  } else {
    memcpy(v, from.words, sizeof(v));
  }
}
template <class T, int kVector>
FRD_DEVICE Vector<T, kVector> pack_vector(const float (&v)[kVector]) {
  Vector<T, kVector> to;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) to.words[i / 2] = pack<T>(v[i], v[i + 1]);
  } else {
    memcpy(to.words, v, sizeof(v));
  }
  return to;
}

// The first `count` elements; kWide: all of them at once.
template <bool kWide, class T, int kVector>
FRD_DEVICE void load_vector(const T* from, int count, Vector<T, kVector>& to) {
  if constexpr (kWide) {
    to = *reinterpret_cast<const Vector<T, kVector>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) reinterpret_cast<T*>(to.words)[i] = from[i];
  }
}
template <bool kWide, class T, int kVector>
FRD_DEVICE void store_vector(const Vector<T, kVector>& from, int count, T* to) {
  if constexpr (kWide) {
    *reinterpret_cast<Vector<T, kVector>*>(to) = from;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) to[i] = reinterpret_cast<const T*>(from.words)[i];
  }
}

// A vector of outputs: where it goes in its image (negative: nowhere), and the residual or gate there.
template <class T, int kVector>
struct Pending {
  int at, count;
  Vector<T, kVector> extra;
};

// Finishes the sums of one tile; kWide: whole vectors at aligned addresses.
template <class S, int kVector, bool kWide>
struct TileFinish {
  using T = typename S::T;
  const BlockProduct& a;
  int y0, x0, first_out;
  const T* extra;
  T* out;

  __device__ __forceinline__ TileFinish(const BlockProduct& product, const TilePlace& place, int first)
      : a(product), y0(place.y), x0(place.x), first_out(first) {
    const int64_t image = place.image * a.out_channels * a.out_height * a.out_width;
    extra = a.extra ? static_cast<const T*>(a.extra) + image : nullptr;
    out = static_cast<T*>(a.out) + image;
  }

  // Columns `column` on of row `row` of the product: loads what they need, so that several are under way at
  // once.
  __device__ __forceinline__ Pending<T, kVector> fetch(int row, int column) const {
    const int pixel = S::kPixels ? row : column;
    const int channel = first_out + (S::kPixels ? column : row);
    const int y = y0 + pixel / S::Tile::kColumns;
    const int x = x0 + pixel % S::Tile::kColumns;
    Pending<T, kVector> p{-1, kVector, {}};
    if (y >= a.out_height || x >= a.out_width || channel >= a.out_channels) return p;
    p.at = S::kPixels ? (y * a.out_width + x) * a.out_channels + channel
                      : (channel * a.out_height + y) * a.out_width + x;
    if constexpr (!kWide) {
      const int left = S::kPixels ? a.out_channels - channel : a.out_width - x;
      if (left < kVector) p.count = left;
    }
    if (extra) load_vector<kWide>(extra + p.at, p.count, p.extra);
    return p;
  }

  __device__ __forceinline__ void give(int row, int column, float (&v)[kVector],
                                       const Pending<T, kVector>& p) const {
    if (p.at < 0) return;
    if (a.point_bias) add_bias(first_out + (S::kPixels ? column : row), p.count, v);
    if (extra) {
      float e[kVector];
      unpack_vector<T>(p.extra, e);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        v[i] = a.gate ? (e[i] <= 0 ? 0.f : v[i]) : v[i] + e[i];  // NaN opens the gate
    }
    store_vector<kWide>(pack_vector<T>(v), p.count, out + p.at);
  }

  __device__ __forceinline__ void add_bias(int channel, int count, float (&v)[kVector]) const {
    const T* from = static_cast<const T*>(a.point_bias) + channel;
    if constexpr (S::kPixels) {
      Vector<T, kVector> bias{};
      load_vector<kWide>(from, count, bias);
      float b[kVector];
      unpack_vector<T>(bias, b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += b[i];
    } else {
      const float b = load(*from);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += b;
    }
  }
};

}  // namespace frd
