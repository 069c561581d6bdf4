// Copies from global to shared memory, asynchronous if sizes and addresses allow it.
#pragma once
#include "pdc_block/cuda/shape.cuh"

namespace frd {

// The word of p[at] and, for 16-bit elements, p[next]; zeros where not in range.
template <class T>
FRD_DEVICE uint32_t load_word_if(const T* p, int at, bool in_range, int next, bool next_in_range) {
  if constexpr (sizeof(T) == 2) {
    return join_halves(in_range ? p[at].bits : 0, next_in_range ? p[next].bits : 0);
  } else {
    uint32_t word = 0;
    if (in_range) memcpy(&word, p + at, 4);
    return word;
  }
}

// The halo of a tile in channels_last, of channels [c0, c0 + kSlab); zeros outside the image.
template <class S, bool kVectorized>
FRD_DEVICE void load_pixels(const BlockProduct& a, const TilePosition& position, int c0, uint32_t* halo) {
  using T = typename S::T;
  // Groups of words per pixel, and words per group.
  constexpr int kGroups = kVectorized ? 8 : 32;
  constexpr int kWords = 32 / kGroups;
  const T* image = static_cast<const T*>(a.x) + position.image * a.height * a.width * a.channels;
  const int columns = a.halo_columns.divisor;
  const int count = a.halo_rows * columns;
  const int group = threadIdx.x % kGroups;
  const int c = c0 + group * kWords * S::kUnit;
  for (int pixel = threadIdx.x / kGroups; pixel < count; pixel += S::kThreads / kGroups) {
    const int row = a.halo_columns.quotient(pixel);
    const int column = pixel - row * columns;
    const int y = position.y - a.reach + row;
    const int x = position.x - a.left_halo + column;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.height) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(a.width) && c < a.channels;
    const int at = (y * a.width + x) * a.channels + c;
    uint32_t* to = halo + pixel * S::kPitch + group * kWords;
    if constexpr (kVectorized)
      cp_async_16(to, inside ? image + at : image, inside ? 16 : 0);
    else
      *to = load_word_if(image, at, inside, at + 1, inside && c + 1 < a.channels);
  }
}

// The same in NCHW; a lane copies one word of a row for each channel in turn.
template <class S>
FRD_DEVICE void load_planes(const BlockProduct& a, const TilePosition& position, int c0, uint32_t* halo) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int plane = a.height * a.width;
  const T* image = static_cast<const T*>(a.x) + position.image * plane * a.channels;
  const int columns = a.halo_columns.divisor;
  const int count = a.halo_rows * columns;
  for (int i = lane; i < count; i += 32) {
    const int row = a.halo_columns.quotient(i);
    const int column = i - row * columns;
    const int y = position.y - a.reach + row;
    const int x = position.x - a.left_halo + column * (S::kPaired ? 2 : 1);
    const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
    const bool inside = row_inside && static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
    const bool next_inside = row_inside && static_cast<unsigned>(x + 1) < static_cast<unsigned>(a.width);
    int at = (c0 + warp) * plane + y * a.width + x;
#pragma unroll 4
    for (int c = warp; c < S::kSlab; c += S::Tile::kWarps, at += S::Tile::kWarps * plane) {
      const bool in_range = c0 + c < a.channels;
      uint32_t* to = halo + i * S::kPitch + c;
      if (a.vectorized_x)
        cp_async_4(to, inside && in_range ? image + at : image, inside && in_range ? 4 : 0);
      else
        *to = load_word_if(image, at, inside && in_range, at + 1, next_inside && in_range);
    }
  }
}

// Stencil weights [kSlab, 9] and biases [kSlab] of the channels from c0 on; zeros beyond the last.
template <class S>
FRD_DEVICE void load_stencil(const BlockProduct& a, int c0, uint32_t* to) {
  using T = typename S::T;
  const int channels = a.channels - c0;
  const int weights = channels * kPdcWeights;
  const int biases = a.stencil_bias ? channels : 0;
  const T* weight = static_cast<const T*>(a.stencil) + static_cast<int64_t>(c0) * kPdcWeights;
  const T* bias = a.stencil_bias ? static_cast<const T*>(a.stencil_bias) + c0 : weight;
  const int width = a.vectorized_stencil ? 4 : 1;
  for (int i = threadIdx.x * width; i < S::kStencilWords + 32; i += S::kThreads * width) {
    const bool is_bias = i >= S::kStencilWords;
    const int at = (is_bias ? i - S::kStencilWords : i) * S::kUnit;
    const int left = (is_bias ? biases : weights) - at;
    const T* from = is_bias ? bias : weight;
    if (a.vectorized_stencil) {
      const int bytes = left * static_cast<int>(sizeof(T));
      cp_async_16(to + i, left > 0 ? from + at : from, bytes < 0 ? 0 : bytes > 16 ? 16 : bytes);
    } else {
      to[i] = load_word_if(from, at, left > 0, at + 1, left > 1);
    }
  }
}

// Copies to a stage all that the hidden values of one slab need.
template <class S>
FRD_DEVICE void load_stage(const BlockProduct& a, const TilePosition& position, int slab, uint32_t* stage) {
  const int c0 = slab * S::kSlab;
  if (a.prologue != Prologue::gather) {
    if constexpr (!S::kChannelsLast)
      load_planes<S>(a, position, c0, stage);
    else if (a.vectorized_x)
      load_pixels<S, true>(a, position, c0, stage);
    else
      load_pixels<S, false>(a, position, c0, stage);
  }
  if (a.prologue != Prologue::copy) load_stencil<S>(a, c0, stage + a.stage_words - 32 - S::kStencilWords);
}

// A slab of the 1x1 weight, point[first_out + row, slab] for kOuts rows, swizzled.
template <class S>
FRD_DEVICE void load_point(const BlockProduct& a, int first_out, int slab, uint32_t* to) {
  using T = typename S::T;
  const T* point = static_cast<const T*>(a.point);
  const int c0 = slab * S::kSlab;
  if (a.vectorized_point) {
    for (int i = threadIdx.x; i < S::Tile::kOuts * 8; i += S::kThreads) {
      const int row = i >> 3;
      const int group = i & 7;
      const int c = c0 + group * 4 * S::kUnit;
      const bool in_range = first_out + row < a.out_channels && c < a.channels;
      cp_async_16(to + row * 32 + swizzled<T>(row, group) * 4,
                  in_range ? point + static_cast<int64_t>(first_out + row) * a.channels + c : point,
                  in_range ? 16 : 0);
    }
  } else {
    for (int i = threadIdx.x; i < S::Tile::kOuts * 32; i += S::kThreads) {
      const int row = i >> 5;
      const int unit = i & 31;
      const int c = c0 + unit * S::kUnit;
      const bool in_range = first_out + row < a.out_channels;
      const T* from = point + static_cast<int64_t>(in_range ? first_out + row : 0) * a.channels;
      to[row * 32 + swizzled<T>(row, unit >> 2) * 4 + (unit & 3)] =
          load_word_if(from, c, in_range && c < a.channels, c + 1, in_range && c + 1 < a.channels);
    }
  }
}

}  // namespace frd
