// The fused block: stencil -> ReLU -> 1x1 -> + residual. The stencil is the prologue of a matrix product: its
// tile of hidden values never leaves shared memory.
#pragma once
#include "pdc_block/block_finish.cuh"
#include "pdc_block/block_load.cuh"
#include "pdc_block/block_product.cuh"
#include "pdc_block/block_stencil.cuh"

namespace frd {

// Walks over the slabs of all tiles of a block of threads.
struct SlabCursor {
  int step = 0, slab = 0, tile;
  FRD_HD void advance(int slabs, int stride) {
    ++step;
    if (++slab == slabs) slab = 0, tile += stride;
  }
};

// Step s multiplies slab s while slab s + 1 becomes hidden values and slabs up to s + kStages arrive; half of
// the warps multiply first, so that the tensor cores and the arithmetic units are busy at the same time. One
// barrier a step: it ends the reads of the stage, of the hidden tile and of the weight slot that this step
// overwrites.
template <class T, bool kPixels, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, Tile::kBlocks) pdc_block_kernel(const BlockProduct a) {
  using S = BlockShape<T, kPixels, Tile>;
  constexpr int kStages = Tile::kStages;
  FRD_DYNAMIC_SHARED(uint32_t, shared);
  uint32_t* point = shared + 2 * S::kHiddenWords;
  uint32_t* stages = point + a.point_slots * S::kPointWords;
  const int stride = static_cast<int>(gridDim.x), first_out = static_cast<int>(blockIdx.y) * Tile::kOuts;
  const int first_tile = static_cast<int>(blockIdx.x);
  const int steps = (a.tiles - first_tile + stride - 1) / stride * a.slabs;
  const bool keep_point = a.point_slots >= a.slabs;  // the whole weight fits: it is read once
  const bool multiply_first = threadIdx.x / 128 % 2;

  SlabCursor arriving{0, 0, first_tile}, making{0, 0, first_tile}, multiplying{0, 0, first_tile};
  int point_step = 0, point_slab = 0;
  const auto load_next = [&](bool with_point) {
    if (arriving.step < steps) {
      load_stage<S>(a, place_of<S>(a, arriving.tile), arriving.slab,
                    stages + arriving.step % kStages * a.stage_words);
      arriving.advance(a.slabs, stride);
    }
    if (with_point && point_step < (keep_point ? a.slabs : steps)) {
      const int slot = keep_point ? point_slab : point_step % kStages;
      load_point<S>(a, first_out, point_slab, point + slot * S::kPointWords);
      ++point_step;
      if (++point_slab == a.slabs) point_slab = 0;
    }
    cp_async_commit();
  };

#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) load_next(i > 0);
  TileProduct<T, S::kM, S::kN, Tile::kWarpM, Tile::kWarpN> product;
  product.clear();
#pragma unroll 1
  for (int step = -1; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load_next(true);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == multiply_first) {
        if (step < 0) continue;
        const uint32_t* hidden = shared + step % 2 * S::kHiddenWords;
        const uint32_t* weight = point + (keep_point ? multiplying.slab : step % kStages) * S::kPointWords;
        product.add(kPixels ? hidden : weight, kPixels ? weight : hidden);
        if (multiplying.slab == a.slabs - 1) {
          const TilePlace place = place_of<S>(a, multiplying.tile);
          product.finish(
              [&](int row, int column, auto& v) { finish_vector<S>(a, place, first_out, row, column, v); });
          product.clear();
        }
        multiplying.advance(a.slabs, stride);
      } else if (making.step < steps) {
        make_hidden<S>(a, place_of<S>(a, making.tile), making.slab,
                       stages + making.step % kStages * a.stage_words,
                       shared + making.step % 2 * S::kHiddenWords);
        making.advance(a.slabs, stride);
      }
    }
  }
}

}  // namespace frd
