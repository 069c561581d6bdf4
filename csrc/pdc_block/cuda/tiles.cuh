// The choice of the tile, and with it of the block's kernel.
#pragma once
#include "pdc_block/cuda/at_once.cuh"

namespace frd {

// The largest tile that still occupies three quarters of the GPU.
template <class T, bool kChannelsLast>
BlockTile tile_for(const BlockProductArgs& a, const CudaLimits& limits) {
  const int reach = reach_of(a.prologue);
  const auto blocks_of = [&](auto tile) {
    using Tile = decltype(tile);
    return a.batch * block_count(a.out_height, Tile::kRows) * block_count(a.out_width, Tile::kColumns) *
           block_count(a.out_channels, Tile::kOuts);
  };
  const auto fits = [&](auto tile) {
    using Tile = decltype(tile);
    return BlockShape<T, kChannelsLast, Tile>::shared_bytes(reach, Tile::kStages) <= limits.shared_per_block;
  };
  const auto suits = [&](auto tile) {
    return 4 * blocks_of(tile) >= 3 * int64_t{limits.multiprocessors} && fits(tile);
  };
  if (a.out_channels > MediumTile::kOuts && suits(LargeTile{})) return BlockTile::large;
  if (!suits(MediumTile{})) return a.newer_tiles ? BlockTile::at_once : BlockTile::small;
  const bool one_wave = blocks_of(MediumTile{}) <= limits.multiprocessors;
  return a.newer_tiles && one_wave && fits(DeepMediumTile{}) ? BlockTile::deep_medium : BlockTile::medium;
}

template <class T, bool kChannelsLast>
cudaError_t block_product(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream) {
  switch (tile_for<T, kChannelsLast>(a, limits)) {
    case BlockTile::large:
      return launch_product<T, kChannelsLast, LargeTile>(a, limits, stream);
    case BlockTile::deep_medium:
      return launch_product<T, kChannelsLast, DeepMediumTile>(a, limits, stream);
    case BlockTile::medium:
      return launch_product<T, kChannelsLast, MediumTile>(a, limits, stream);
    case BlockTile::at_once:
      return launch_at_once<T, kChannelsLast>(a, limits, stream);
    default:
      return launch_product<T, kChannelsLast, SmallTile>(a, limits, stream);
  }
}

template <class T>
cudaError_t block_product(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream) {
  return a.channels_last ? block_product<T, true>(a, limits, stream)
                         : block_product<T, false>(a, limits, stream);
}

}  // namespace frd
