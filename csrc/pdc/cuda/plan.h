// Arguments of the CUDA kernels, and how the launchers derive tiles from a problem. The tiled kernels take
// stride 1 only. A dilated window is dense on the lattice of every dilation-th pixel, so a tile is a
// rectangle of such a lattice.
#pragma once
#include <algorithm>

#include "pdc/cuda/launch.h"
#include "pdc/taps.h"

namespace frd {

// Division of 0 <= n < 2^31 by a positive divisor known on the host, as a multiplication and a shift.
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

// One axis of the tiles. Position p is element p + in_begin of x and element p + out_begin of y or dy. Phase
// f holds the positions f, f + dilation, ...
struct PdcTileAxis {
  int in_begin, out_begin, in_size, out_size, dilation;
  // Subtiles per tile; their size is a constant of the kernel.
  int subtiles;
  // Tiles per phase.
  Divisor per_phase;

  // First position of a tile of `size` positions.
  FRD_HD int first(int tile, int size) const {
    const int phase = per_phase.divide(tile);
    return phase + (tile - phase * static_cast<int>(per_phase.value)) * size * dilation;
  }
};

// Arguments of the tiled kernels.
struct PdcTiles {
  PdcTileAxis y, x;
  // Tiles per image and per row of tiles.
  Divisor per_image, per_row;
  // Groups of channels, one per block; in NCHW the channels.
  Divisor groups;
  int channels;
  // Tiles of all images; in the forward of NCHW of all planes.
  int units;
  // channels_last: a bundle is the 32 >> log_lanes tiles that a warp holds side by side, so that images with
  // few channels fill it too.
  int log_lanes, bundles;
  // channels_last: 16, 8 or 4, from the alignment of source and grad.
  int copy_bytes;
  // Blocks per group, in NCHW warps per channel. Part i takes the bundles or units i, i + parts, ...
  int parts;
  float theta;
  const void* source;  // x [B, C, H, W] or [B, H, W, C]
  const void* weight;  // [C, 9]
  const void* bias;    // [C] or null
  const void* grad;    // dy [B, C, Ho, Wo] or [B, Ho, Wo, C]
  void* gated;         // forward: as in PdcProblem
  void* out;           // y, or dx, or null if dx is not needed
  float* sums;         // [parts, 10, C], or null if dw is not needed
};

// In NCHW `image` counts planes.
struct PdcTile {
  int image, row, column;
};

FRD_HD inline PdcTile tile_of(const PdcTiles& p, int unit) {
  const int image = p.per_image.divide(unit);
  const int tile = unit - image * static_cast<int>(p.per_image.value);
  const int row = p.per_row.divide(tile);
  return {image, row, tile - row * static_cast<int>(p.per_row.value)};
}

// Arguments of the general kernels, which take any stride, layout and dtype.
struct PdcGather {
  // From source to out; for dx already the axes of the input's gradient.
  PdcAxis y, x;
  Divisor upsample_y, upsample_x;
  int channels;
  bool channels_last;
  // If out is dx: the kind of the convolution whose weights are given.
  PdcKind forward_kind;
  bool is_input_grad;
  // theta == 1.
  bool pure;
  double theta;
  // Innermost and middle size of an output's index: C, x.out (channels_last) or x.out, y.out (NCHW). The sums
  // index pixels alone, by x.out.
  Divisor inner, middle;
  // Elements of an output image; for the sums its pixels.
  int outputs;
  // Blocks per image; for the sums units per image.
  Divisor chunks;
  // For the sums: units of all images. Block (part, group) takes the units part, part + parts, ...
  int units, parts;
  const void* source;  // x or dy
  const void* weight;  // [C, 9]
  const void* bias;    // [C] or null
  const void* grad;    // dy
  void* gated;         // forward: as in PdcProblem
  void* out;           // y or dx
  void* sums;          // compute type, [parts, 10, C]
};

// Parts of dw. Each costs 40 bytes per channel to write and to read.
constexpr int kMaxParts = 512;
// Of an H100. A constant, so that the order of the sums does not depend on the GPU.
constexpr int kMultiprocessors = 132;
constexpr int kTargetBlocks = 8 * kMultiprocessors;

inline int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline bool all_aligned(const PdcProblem& p, int bytes) {
  return aligned(p.source, bytes) && aligned(p.grad, bytes) && aligned(p.out, bytes) &&
         aligned(p.gated, bytes);
}

// The tiled kernels index positions with 32 bits. No image comes near these limits.
inline bool fits_tiles(const PdcAxis& a) {
  constexpr int64_t kMax = 1 << 24;
  return a.stride == 1 && a.dilation <= kMax && a.padding <= kMax && a.padding >= -kMax && a.out <= kMax &&
         a.in <= kMax && a.dilation * 64 <= kMax;
}
// The tiles take no float64, and gate gradients for theta 1 only, as in the networks' blocks.
inline bool fits_tiles(const PdcProblem& p) {
  const bool pure = p.kind == PdcKind::vanilla || p.theta == 1;
  return p.dtype != DType::f64 && fits_tiles(p.y) && fits_tiles(p.x) && (pure || !p.gated);
}

// Range of positions that the tiles cover, see PdcTileAxis.
struct Frame {
  int64_t in_begin, out_begin, size;
};

// The positions with an output; in the backward those with a pixel of x or of dy.
inline Frame frame_of(const PdcAxis& a, PdcKind kind, bool backward) {
  const int64_t excess = a.padding - kernel_side(kind) / 2 * a.dilation;
  if (!backward || excess >= 0) return {-excess, 0, a.out};
  return {0, excess, a.in};
}

inline PdcTileAxis tile_axis(const PdcAxis& a, const Frame& frame) {
  PdcTileAxis t{};
  t.in_begin = static_cast<int>(frame.in_begin);
  t.out_begin = static_cast<int>(frame.out_begin);
  t.in_size = static_cast<int>(a.in);
  t.out_size = static_cast<int>(a.out);
  t.dilation = static_cast<int>(a.dilation);
  t.subtiles = 1;
  return t;
}

// Phases of the axis that are not empty.
inline int64_t phases_of(const PdcAxis& a, const Frame& frame) { return std::min(a.dilation, frame.size); }

// Units and blocks are indexed with 32 bits as well.
struct Plan {
  PdcTiles tiles;
  int64_t units;
  bool fits() const { return units < (int64_t{1} << 31) - kMaxThreads; }
  static constexpr int kMaxThreads = 1024;
};

// About `wanted` parts, of equal numbers of units up to the last.
inline int balanced_parts(int64_t units, int64_t wanted) {
  const int64_t parts = std::clamp<int64_t>(wanted, 1, units);
  return static_cast<int>(ceil_divide(units, ceil_divide(units, parts)));
}

inline void set_pointers(PdcTiles& t, const PdcProblem& p) {
  t.theta = static_cast<float>(p.theta);
  t.source = p.source;
  t.weight = p.weight;
  t.bias = p.bias;
  t.grad = p.grad;
  t.gated = p.gated;
  t.out = p.out;
  t.sums = static_cast<float*>(p.sums);
  t.channels = static_cast<int>(p.channels);
}

template <bool pure>
struct PureTag {
  static constexpr bool value = pure;
};

// Calls f(kind, pure, element) with tags of the problem's kind, theta == 1 and dtype (not float64).
template <typename F>
void with_case(const PdcProblem& p, F f) {
  const auto with_element = [&](auto kind, auto pure) {
    if (p.dtype == DType::f32) f(kind, pure, float{});
    if (p.dtype == DType::bf16) f(kind, pure, bf16{});
    if (p.dtype == DType::f16) f(kind, pure, f16{});
  };
  with_kind(p.kind, [&](auto kind) {
    if constexpr (decltype(kind)::value == PdcKind::vanilla) {
      with_element(kind, PureTag<true>{});
    } else if (p.theta == 1) {
      with_element(kind, PureTag<true>{});
    } else {
      with_element(kind, PureTag<false>{});
    }
  });
}

}  // namespace frd
