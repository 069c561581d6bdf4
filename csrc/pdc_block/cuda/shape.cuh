// Tiles of the block's product and how they lie in shared memory.
#pragma once
#include "core/cuda_compat.h"
#include "core/mma.h"
#include "pdc_block/cuda/launch.h"

namespace frd {

// A block of threads makes kRows x kColumns pixels of kOuts output channels; each warp kWarpM x kWarpN of
// them. kStages slabs of the input are in flight. The large tile reads least (each pixel's stencil is taken
// once up to 256 output channels); the small one serves images that would leave most of a card idle.
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

// n / divisor by a multiplication, for 0 <= n < 2^31 and a divisor below 2^31.
struct Divider {
  uint32_t multiplier = 0;
  int divisor = 1;
  int shift = 0;
  Divider() = default;
  explicit Divider(int by) : divisor(by) {
    while ((int64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + by - 1) / by);
  }
  FRD_HD int quotient(int n) const {  // the high word of a product of two words, shifted
    return static_cast<int>(
        static_cast<uint32_t>((static_cast<uint64_t>(multiplier) * (2u * static_cast<uint32_t>(n))) >> 32) >>
        shift);
  }
};

// The arguments as the kernel wants them.
struct BlockProduct : BlockProductArgs {
  Divider slabs;    // of the reduction
  int point_slots;  // of shared memory for their weights
  int reach, lead;  // of the halo: rows above, columns to the left of the tile
  int halo_rows;
  Divider halo_columns, tiles_x, tiles_of_image;
  int tiles;
  int stage_words;
  const void* extra;                                // residual or gate
  bool wide_x, wide_stencil, wide_point, wide_out;  // sizes and addresses allow vectors
};

template <class T_, bool kPixels_, class Tile_>
struct BlockShape {
  using T = T_;
  using Tile = Tile_;
  static constexpr bool kPixels = kPixels_;                      // channels_last, else NCHW
  static constexpr int kUnit = 4 / static_cast<int>(sizeof(T));  // elements of a word
  static constexpr int kSlab = 32 * kUnit;                       // channels that a step multiplies
  static constexpr int kThreads = Tile::kWarps * 32;
  static constexpr int kPixelCount = Tile::kRows * Tile::kColumns;

  // In NCHW, where rows of 16-bit pixels are copied word by word, a word of the halo holds two pixels of a
  // channel; else it holds kUnit channels of a pixel. An odd pitch keeps writes across pixels free of bank
  // conflicts.
  static constexpr bool kPaired = !kPixels && kUnit == 2;
  static constexpr int kPitch = kPixels ? 32 : kPaired ? 65 : 33;
  static constexpr int kStripChannels = kPaired ? 1 : kUnit;
  static constexpr int kStripRows =
      kPaired && Tile::kRows >= 2 * Tile::kStripRows ? 2 * Tile::kStripRows : Tile::kStripRows;
  static constexpr int kStripsX = Tile::kColumns / 2;
  static constexpr int kStripsY = Tile::kRows / kStripRows;
  static constexpr int kStrips = kStripsX * kStripsY * (kPaired ? 2 : 1);  // of 32 lanes
  static_assert(kStrips % Tile::kWarps == 0, "every warp takes as many strips");

  // The product's rows and columns: whichever of pixels and output channels lies contiguous in memory is
  // columns.
  static constexpr int kM = kPixels ? kPixelCount : Tile::kOuts;
  static constexpr int kN = kPixels ? Tile::kOuts : kPixelCount;

  static FRD_HD constexpr int lead(int reach) { return kPaired && reach > 0 ? 2 : reach; }
  static FRD_HD constexpr int halo_rows(int reach) { return Tile::kRows + 2 * reach; }
  static FRD_HD constexpr int halo_columns(int reach) {  // in words of a row
    return (Tile::kColumns + 2 * lead(reach)) / (kPaired ? 2 : 1);
  }
  static constexpr int kStencilWords = kSlab * kPdcWeights / kUnit;
  static FRD_HD constexpr int halo_words(int reach) {
    return (halo_rows(reach) * halo_columns(reach) * kPitch + 3) / 4 * 4;
  }
  // halo, weights [kSlab, 9], biases [kSlab]
  static FRD_HD constexpr int stage_words(int reach) { return halo_words(reach) + kStencilWords + 32; }
  static constexpr int kHiddenWords = kPixelCount * 32;
  static constexpr int kPointWords = Tile::kOuts * 32;
  // two tiles of hidden values, then `slots` of the 1x1 weight, then the stages
  static FRD_HD constexpr int shared_bytes(int reach, int slots) {
    return 4 * (2 * kHiddenWords + slots * kPointWords + Tile::kStages * stage_words(reach));
  }
};

// Both operands of the product are rows of 32 words of which groups of four are permuted, so that a column of
// groups lies in different banks: in 16 bit for eight consecutive rows (ldmatrix), in 32 bit for every fourth
// row (a thread's four consecutive columns of the result).
template <class T>
FRD_HD constexpr int permuted(int row, int group) {
  return group ^ ((sizeof(T) == 2 ? row : row >> 2) & 7);
}

FRD_DEVICE float relu(float v) { return v <= 0 ? 0.f : v; }  // NaN stays NaN

struct TilePlace {
  int64_t image;
  int y, x;  // of the first output pixel
};
template <class S>
FRD_DEVICE TilePlace place_of(const BlockProduct& a, int tile) {
  const int image = a.tiles_of_image.quotient(tile);
  const int rest = tile - image * a.tiles_of_image.divisor;
  const int row = a.tiles_x.quotient(rest);
  const int column = rest - row * a.tiles_x.divisor;
  return {image, row * S::Tile::kRows, column * S::Tile::kColumns};
}

}  // namespace frd
