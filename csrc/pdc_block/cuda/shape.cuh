// Tiles of the block's matrix product and their layout in shared memory.
#pragma once
#include "core/cuda_compat.h"
#include "core/mma.h"
#include "pdc_block/cuda/launch.h"

namespace frd {

// ceil(n / by).
inline int block_count(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// A thread block computes kRows x kColumns pixels of kOuts output channels, and each warp kWarpM x kWarpN of
// them. kStages slabs of the input are in flight; kBlocks thread blocks fit a multiprocessor. The large tile
// reads least, as it computes each pixel's stencil once for up to 256 output channels. The small one is for
// images that would leave most of the GPU idle.
struct LargeTile {
  static constexpr int kRows = 8;
  static constexpr int kColumns = 16;
  static constexpr int kOuts = 256;
  static constexpr int kWarps = 16;
  static constexpr int kWarpM = 32;
  static constexpr int kWarpN = 64;
  static constexpr int kStages = 2;
  static constexpr int kBlocks = 1;
  static constexpr int kStripRows = 4;
};
struct MediumTile {
  static constexpr int kRows = 8;
  static constexpr int kColumns = 8;
  static constexpr int kOuts = 128;
  static constexpr int kWarps = 8;
  static constexpr int kWarpM = 32;
  static constexpr int kWarpN = 32;
  static constexpr int kStages = 2;
  static constexpr int kBlocks = 2;
  static constexpr int kStripRows = 4;
};
// For one wave of blocks, which have a multiprocessor each: more slabs in flight.
struct DeepMediumTile : MediumTile {
  static constexpr int kStages = 4;
  static constexpr int kBlocks = 1;
};
struct SmallTile {
  static constexpr int kRows = 2;
  static constexpr int kColumns = 8;
  static constexpr int kOuts = 32;
  static constexpr int kWarps = 4;
  static constexpr int kWarpM = 16;
  static constexpr int kWarpN = 8;
  static constexpr int kStages = 4;
  static constexpr int kBlocks = 4;
  static constexpr int kStripRows = 2;
};

// Division of 0 <= n < 2^31 by a divisor below 2^31, as a multiplication and a shift.
struct Divider {
  uint32_t multiplier = 0;
  int divisor = 1;
  int shift = 0;
  Divider() = default;
  explicit Divider(int by) : divisor(by) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by);
  }
  // The high word of a product of two words, shifted.
  FRD_HD int quotient(int n) const {
    return static_cast<int>(
        static_cast<uint32_t>((static_cast<uint64_t>(multiplier) * (2u * static_cast<uint32_t>(n))) >> 32) >>
        shift);
  }
};

// Arguments of the kernel.
struct BlockProduct : BlockProductArgs {
  // Slabs of channels that the product sums over.
  Divider slabs;
  // Slots of shared memory for slabs of the 1x1 weight.
  int slots;
  // Halo of a tile: rows above and below it, columns to the left.
  int reach, left_halo;
  int halo_rows;
  Divider halo_columns, tiles_x, tiles_of_image;
  int tiles;
  int stage_words;
  // residual or gate [B, Co, Ho, Wo], or null.
  const void* extra;
  // Whether sizes and addresses allow vector loads and stores.
  bool vectorized_x, vectorized_stencil, vectorized_point, vectorized_out;
};

template <class T_, bool kChannelsLast_, class Tile_>
struct BlockShape {
  using T = T_;
  using Tile = Tile_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  // Elements of a word.
  static constexpr int kUnit = 4 / static_cast<int>(sizeof(T));
  // Channels of a slab, which one step multiplies.
  static constexpr int kSlab = 32 * kUnit;
  static constexpr int kThreads = Tile::kWarps * 32;
  static constexpr int kPixelCount = Tile::kRows * Tile::kColumns;

  // A word of the halo holds kUnit channels of a pixel; but kPaired, in NCHW with 16-bit elements, it holds
  // two pixels of a channel, as rows are copied word by word. An odd pitch keeps writes across pixels free of
  // bank conflicts.
  static constexpr bool kPaired = !kChannelsLast && kUnit == 2;
  static constexpr int kPitch = kChannelsLast ? 32 : kPaired ? 65 : 33;
  static constexpr int kStripChannels = kPaired ? 1 : kUnit;
  static constexpr int kStripRows =
      kPaired && Tile::kRows >= 2 * Tile::kStripRows ? 2 * Tile::kStripRows : Tile::kStripRows;
  static constexpr int kStripsX = Tile::kColumns / 2;
  static constexpr int kStripsY = Tile::kRows / kStripRows;
  // Strips of 32 lanes.
  static constexpr int kStrips = kStripsX * kStripsY * (kPaired ? 2 : 1);

  // The product's rows and columns. Of pixels and output channels, those contiguous in memory are the
  // columns.
  static constexpr int kM = kChannelsLast ? kPixelCount : Tile::kOuts;
  static constexpr int kN = kChannelsLast ? Tile::kOuts : kPixelCount;

  static FRD_HD constexpr int left_halo(int reach) { return kPaired && reach > 0 ? 2 : reach; }
  static FRD_HD constexpr int halo_rows(int reach) { return Tile::kRows + 2 * reach; }
  // Words of a row of the halo.
  static FRD_HD constexpr int halo_columns(int reach) {
    return (Tile::kColumns + 2 * left_halo(reach)) / (kPaired ? 2 : 1);
  }
  static constexpr int kStencilWords = kSlab * kPdcWeights / kUnit;
  static FRD_HD constexpr int halo_words(int reach) {
    return (halo_rows(reach) * halo_columns(reach) * kPitch + 3) / 4 * 4;
  }
  // A stage holds the halo, the weights [kSlab, 9] and the biases [kSlab].
  static FRD_HD constexpr int stage_words(int reach) { return halo_words(reach) + kStencilWords + 32; }
  static constexpr int kHiddenWords = kPixelCount * 32;
  static constexpr int kPointWords = Tile::kOuts * 32;
  // Shared memory holds two tiles of hidden values, `slots` slabs of the 1x1 weight, and the stages.
  static FRD_HD constexpr int shared_bytes(int reach, int slots) {
    return 4 * (2 * kHiddenWords + slots * kPointWords + Tile::kStages * stage_words(reach));
  }
};

// Both operands of the product are rows of 32 words, whose groups of four words are swizzled so that a column
// of groups is in different banks: for 16-bit elements in eight consecutive rows (ldmatrix), for 32-bit
// elements in every fourth row (a thread's four consecutive columns of the result).
template <class T>
FRD_HD constexpr int swizzled(int row, int group) {
  return group ^ ((sizeof(T) == 2 ? row : row >> 2) & 7);
}

// Keeps NaN.
FRD_DEVICE float relu(float v) { return v <= 0 ? 0.f : v; }

// Of the first output pixel of a tile.
struct TilePosition {
  int64_t image;
  int y, x;
};
template <class S>
FRD_DEVICE TilePosition position_of(const BlockProduct& a, int tile) {
  const int image = a.tiles_of_image.quotient(tile);
  const int rest = tile - image * a.tiles_of_image.divisor;
  const int row = a.tiles_x.quotient(rest);
  const int column = rest - row * a.tiles_x.divisor;
  return {image, row * S::Tile::kRows, column * S::Tile::kColumns};
}

}  // namespace frd
