// The size of a block of threads and of its tiles. No torch here.
#pragma once
#include "core/dtypes.h"

namespace frd {

constexpr int kBlockThreads = 256, kBlockWarps = kBlockThreads / 32;
constexpr int kTileRows = 32;     // tokens or centres of a tile
constexpr int kTileColumns = 64;  // of a product's tile

// Elements from one row of a tile to the next: keeps rows aligned to 16 bytes, and the banks of eight
// neighbouring rows apart.
FRD_HD static inline int tile_pitch(int channels) { return (channels + 31) / 32 * 32 + 4; }

}  // namespace frd
