// Copies from global to shared memory, asynchronous where sizes and addresses allow it.
#pragma once
#include "pdc_block/block_shape.cuh"

namespace frd {

// Elements at `at` and, in 16 bit, at `next`; zeros where not there.
template <class T>
FRD_DEVICE uint32_t gathered_word(const T* p, int at, bool there, int next, bool next_there) {
  if constexpr (sizeof(T) == 2) {
    return join_halves(there ? p[at].bits : 0, next_there ? p[next].bits : 0);
  } else {
    uint32_t word = 0;
    if (there) memcpy(&word, p + at, 4);
    return word;
  }
}

// The halo of a tile in channels_last, channels [c0, c0 + kSlab): zeros outside the image.
template <class S>
FRD_DEVICE void load_pixels(const BlockProduct& a, const TilePlace& place, int c0, uint32_t* halo) {
  using T = typename S::T;
  const T* image = static_cast<const T*>(a.x) + place.image * a.height * a.width * a.channels;
  const int columns = a.halo_columns.divisor, count = a.halo_rows * columns;
  const int groups = a.wide_x ? 8 : 32, width = a.wide_x ? 4 * S::kUnit : S::kUnit;
  for (int i = threadIdx.x; i < count * groups; i += S::kThreads) {
    const int pixel = a.wide_x ? i >> 3 : i >> 5, group = i & (groups - 1);
    const int row = a.halo_columns.quotient(pixel), column = pixel - row * columns;
    const int y = place.y - a.reach + row, x = place.x - a.lead + column, c = c0 + group * width;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.height) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
    const int at = (y * a.width + x) * a.channels + c;
    if (a.wide_x) {
      const bool there = inside && c < a.channels;
      cp_async_16(halo + pixel * S::kPitch + group * 4, there ? image + at : image, there ? 16 : 0);
    } else {
      halo[pixel * S::kPitch + group] =
          gathered_word(image, at, inside && c < a.channels, at + 1, inside && c + 1 < a.channels);
    }
  }
}

// The same in NCHW: a lane takes a word of a row for one channel after another.
template <class S>
FRD_DEVICE void load_planes(const BlockProduct& a, const TilePlace& place, int c0, uint32_t* halo) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, plane = a.height * a.width;
  const T* image = static_cast<const T*>(a.x) + place.image * plane * a.channels;
  const int columns = a.halo_columns.divisor, count = a.halo_rows * columns;
  for (int i = lane; i < count; i += 32) {
    const int row = a.halo_columns.quotient(i), column = i - row * columns;
    const int y = place.y - a.reach + row, x = place.x - a.lead + column * (S::kPaired ? 2 : 1);
    const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(a.height);
    const bool inside = row_inside && static_cast<unsigned>(x) < static_cast<unsigned>(a.width);
    const bool next_inside = row_inside && static_cast<unsigned>(x + 1) < static_cast<unsigned>(a.width);
    int at = (c0 + warp) * plane + y * a.width + x;
#pragma unroll 4
    for (int c = warp; c < S::kSlab; c += S::Tile::kWarps, at += S::Tile::kWarps * plane) {
      const bool there = c0 + c < a.channels;
      uint32_t* to = halo + i * S::kPitch + c;
      if (a.wide_x)
        cp_async_4(to, inside && there ? image + at : image, inside && there ? 4 : 0);
      else
        *to = gathered_word(image, at, inside && there, at + 1, next_inside && there);
    }
  }
}

// `count` elements of the `left` that there are, zeros beyond; from and to aligned to 16 bytes if wide.
template <class S>
FRD_DEVICE void load_row(const typename S::T* from, int left, int count, bool wide, uint32_t* to) {
  using T = typename S::T;
  const int groups = count / S::kUnit / (wide ? 4 : 1);
  for (int i = threadIdx.x; i < groups; i += S::kThreads) {
    if (wide) {
      const int rest = (left - i * 4 * S::kUnit) * static_cast<int>(sizeof(T)), bytes = rest < 0    ? 0
                                                                                        : rest > 16 ? 16
                                                                                                    : rest;
      cp_async_16(to + 4 * i, bytes ? from + i * 4 * S::kUnit : from, bytes);
    } else {
      const int at = i * S::kUnit;
      to[i] = gathered_word(from, at, at < left, at + 1, at + 1 < left);
    }
  }
}

// Everything that the hidden values of one slab need, into one stage.
template <class S>
FRD_DEVICE void load_stage(const BlockProduct& a, const TilePlace& place, int slab, uint32_t* stage) {
  using T = typename S::T;
  const int c0 = slab * S::kSlab, left = a.channels - c0;
  if (a.prologue != Prologue::gather) {
    if constexpr (S::kPixels)
      load_pixels<S>(a, place, c0, stage);
    else
      load_planes<S>(a, place, c0, stage);
  }
  if (a.prologue != Prologue::copy) {
    uint32_t* weights = stage + a.stage_words - 32 - S::kStencilWords;
    load_row<S>(static_cast<const T*>(a.stencil) + static_cast<int64_t>(c0) * kPdcWeights, left * kPdcWeights,
                S::kSlab * kPdcWeights, a.wide_stencil, weights);
    load_row<S>(static_cast<const T*>(a.stencil_bias) + (a.stencil_bias ? c0 : 0), a.stencil_bias ? left : 0,
                S::kSlab, a.wide_stencil, weights + S::kStencilWords);
  }
}

// point[first_out + row, c0 + ...] for kOuts rows, permuted.
template <class S>
FRD_DEVICE void load_point(const BlockProduct& a, int first_out, int slab, uint32_t* to) {
  using T = typename S::T;
  const T* point = static_cast<const T*>(a.point);
  const int c0 = slab * S::kSlab;
  if (a.wide_point) {
    for (int i = threadIdx.x; i < S::Tile::kOuts * 8; i += S::kThreads) {
      const int row = i >> 3, group = i & 7, c = c0 + group * 4 * S::kUnit;
      const bool there = first_out + row < a.out_channels && c < a.channels;
      cp_async_16(to + row * 32 + permuted<T>(row, group) * 4,
                  there ? point + static_cast<int64_t>(first_out + row) * a.channels + c : point,
                  there ? 16 : 0);
    }
  } else {
    for (int i = threadIdx.x; i < S::Tile::kOuts * 32; i += S::kThreads) {
      const int row = i >> 5, unit = i & 31, c = c0 + unit * S::kUnit;
      const bool there = first_out + row < a.out_channels;
      const T* from = point + static_cast<int64_t>(there ? first_out + row : 0) * a.channels;
      to[row * 32 + permuted<T>(row, unit >> 2) * 4 + (unit & 3)] =
          gathered_word(from, c, there && c < a.channels, c + 1, there && c + 1 < a.channels);
    }
  }
}

}  // namespace frd
