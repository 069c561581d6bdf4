// Choice of the tile and launch of the block's product, for inst.cu.
#pragma once
#include "pdc_block/cuda/block.cuh"

namespace frd {

inline int blocks_of(int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); }

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// kStages slots for the slabs of the 1x1 weight, or, where kBlocks blocks of threads have room for it, one
// for each.
template <class S>
int point_slots(int slabs, int reach, const CudaLimits& limits) {
  constexpr int kReserved = 1024;  // of each resident block
  const int room = limits.shared_per_processor / S::Tile::kBlocks - kReserved;
  const int most = room < limits.shared_per_block ? room : limits.shared_per_block;
  return slabs > S::Tile::kStages && S::shared_bytes(reach, slabs) <= most ? slabs : S::Tile::kStages;
}

inline int reach_of(Prologue p) {
  return p == Prologue::copy || p == Prologue::gather ? 0 : p == Prologue::radial ? 2 : 1;
}

template <class S>
BlockProduct prepare(const BlockProductArgs& args, const CudaLimits& limits) {
  using T = typename S::T;
  constexpr int kSize = sizeof(T);
  BlockProduct a{};
  static_cast<BlockProductArgs&>(a) = args;
  a.extra = a.gate ? a.gate : a.residual;
  a.reach = reach_of(a.prologue);
  a.lead = S::lead(a.reach);
  a.slabs = Divider(blocks_of(a.channels, S::kSlab));
  a.point_slots = point_slots<S>(a.slabs.divisor, a.reach, limits);
  a.halo_rows = S::halo_rows(a.reach);
  a.halo_columns = Divider(S::halo_columns(a.reach));
  a.stage_words = S::stage_words(a.reach);
  const int tiles_x = blocks_of(a.out_width, S::Tile::kColumns);
  const int tiles_y = blocks_of(a.out_height, S::Tile::kRows);
  a.tiles_x = Divider(tiles_x);
  a.tiles_of_image = Divider(tiles_x * tiles_y);
  a.tiles = static_cast<int>(a.batch * tiles_x * tiles_y);
  const bool whole_channels = a.channels * kSize % 16 == 0;
  a.wide_x =
      S::kPixels ? whole_channels && aligned(a.x, 16) : !S::kPaired || (a.width % 2 == 0 && aligned(a.x, 4));
  a.wide_stencil = aligned(a.stencil, 16) && aligned(a.stencil_bias, 16);
  a.wide_point = whole_channels && aligned(a.point, 16);
  constexpr int kVector = TileProduct<T, S::kM, S::kN, S::Tile::kWarpM, S::Tile::kWarpN>::kVector;
  a.wide_out = (S::kPixels ? a.out_channels : a.out_width) % kVector == 0;
  for (const void* p : {static_cast<const void*>(a.out), a.extra, S::kPixels ? a.point_bias : nullptr})
    a.wide_out = a.wide_out && aligned(p, kVector * kSize);
  return a;
}

template <class T, bool kPixels, class Tile>
cudaError_t launch_product(const BlockProductArgs& args, const CudaLimits& limits, cudaStream_t stream) {
  using S = BlockShape<T, kPixels, Tile>;
  const BlockProduct a = prepare<S>(args, limits);
  const int shared = S::shared_bytes(a.reach, a.point_slots);
  const int outs = blocks_of(a.out_channels, Tile::kOuts);
  const auto kernel = pdc_block_kernel<T, kPixels, Tile>;
  if (const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared))
    return error;
  const int resident = limits.processors * Tile::kBlocks / outs;
  const int columns = a.tiles < resident ? a.tiles : resident < 1 ? 1 : resident;
  FRD_LAUNCH(kernel, dim3(columns, outs), dim3(S::kThreads), shared, stream, a);
  return cudaGetLastError();
}

// The largest tile that still fills three quarters of a card.
template <class T, bool kPixels>
BlockTile tile_for(const BlockProductArgs& a, const CudaLimits& limits) {
  const int reach = reach_of(a.prologue);
  const auto fits = [&](auto tile, int64_t fewest_outs) {
    using Tile = decltype(tile);
    using S = BlockShape<T, kPixels, Tile>;
    const int64_t tiles = a.batch * blocks_of(a.out_height, Tile::kRows) *
                          blocks_of(a.out_width, Tile::kColumns) * blocks_of(a.out_channels, Tile::kOuts);
    return a.out_channels > fewest_outs && 4 * tiles >= 3 * int64_t{limits.processors} &&
           S::shared_bytes(reach, Tile::kStages) <= limits.shared_per_block;
  };
  if (fits(LargeTile{}, MediumTile::kOuts)) return BlockTile::large;
  return fits(MediumTile{}, 0) ? BlockTile::medium : BlockTile::small;
}

template <class T, bool kPixels>
cudaError_t launch_product(const BlockProductArgs& a, const CudaLimits& limits, BlockTile tile,
                           cudaStream_t stream) {
  switch (tile) {
    case BlockTile::large:
      return launch_product<T, kPixels, LargeTile>(a, limits, stream);
    case BlockTile::medium:
      return launch_product<T, kPixels, MediumTile>(a, limits, stream);
    default:
      return launch_product<T, kPixels, SmallTile>(a, limits, stream);
  }
}

template <class T>
cudaError_t block_product(const BlockProductArgs& a, const CudaLimits& limits, cudaStream_t stream) {
  if (a.channels_last) return launch_product<T, true>(a, limits, tile_for<T, true>(a, limits), stream);
  return launch_product<T, false>(a, limits, tile_for<T, false>(a, limits), stream);
}

}  // namespace frd
