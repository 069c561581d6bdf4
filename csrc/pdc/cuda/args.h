// What the launchers tell the tiled CUDA kernels. Stride 1 only; a dilated window is dense again on the
// lattice of every dilation-th pixel, so a tile is a rectangle of such a lattice.
#pragma once
#include "pdc/taps.h"

namespace frd {

// Quotient of 0 <= n < 2^31 by a positive divisor that the host knows: a multiplication and a shift.
struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : value(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    while ((int64_t{1} << shift) < d) ++shift;
    if (shift > 0) multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }
  FRD_HD int divide(int n) const {
    return shift == 0 ? n : static_cast<int>((static_cast<uint64_t>(n) * multiplier >> 32) >> (shift - 1));
  }
};

// Position p of an axis: x is read at p + x_first, y or its gradient stands at p + q_first. Phase f holds the
// positions f, f + dilation, ...
struct PdcTileAxis {
  int x_first, q_first, x_size, q_size, dilation;
  int subtiles;       // of a tile; their size belongs to the kernel
  Divisor per_phase;  // tiles of a phase

  // The first position of a tile of `size` positions.
  FRD_HD int first(int tile, int size) const {
    const int phase = per_phase.divide(tile);
    return phase + (tile - phase * static_cast<int>(per_phase.value)) * size * dilation;
  }
};

struct PdcTiles {
  PdcTileAxis y, x;
  Divisor per_image, per_row;  // tiles
  Divisor groups;              // of channels, one for each block; NCHW: the channels
  int channels, units;         // units: tiles of all images, forward of NCHW: of all planes
  // channels_last: a warp holds 32 >> log_lanes tiles side by side, a bundle, so that few channels fill it.
  int log_lanes, bundles;
  int copy_bytes;  // channels_last: 16, 8 or 4, as source and grad are aligned
  int parts;       // blocks of a group, NCHW: warps of a channel; part i takes every parts-th bundle or unit
  float theta;
  const void *source, *weight, *bias, *grad;  // bias may be null
  void* out;                                  // y or dx; null: not wanted
  float* sums;                                // [parts, 10, C]; null: not wanted
};

struct PdcTile {
  int image, row, column;  // NCHW: image counts the planes
};

FRD_HD inline PdcTile tile_of(const PdcTiles& p, int unit) {
  const int image = p.per_image.divide(unit), tile = unit - image * static_cast<int>(p.per_image.value);
  const int row = p.per_row.divide(tile);
  return {image, row, tile - row * static_cast<int>(p.per_row.value)};
}

// What the launchers tell the general kernels: any stride, any layout, any dtype.
struct PdcGather {
  PdcAxis y, x;  // from source to out; those of the gradient of x are turned already
  Divisor insert_y, insert_x;
  int channels;
  bool pixels;          // channels_last
  PdcKind turned_from;  // of the weights, where out is dx
  bool turned, pure;    // pure: theta == 1
  double theta;
  Divisor inner, middle;  // of an output's index: pixels C, x.out; planes x.out, y.out; sums x.out, none
  int outputs;            // of an image: elements; sums: pixels
  Divisor chunks;         // blocks of an image; sums: units of an image
  int units, parts;       // sums: units of all images; block (part, group) takes part, part + parts, ...
  const void *source, *weight, *bias, *grad;  // bias may be null
  void* out;
  void* sums;  // compute type, [parts, 10, C]
};

}  // namespace frd
