// The fused block: stencil -> ReLU -> 1x1 -> + residual. The stencil is the prologue of a matrix product: its
// tile of hidden values never leaves shared memory.
#pragma once
#include "pdc_block/cuda/finish.cuh"
#include "pdc_block/cuda/load.cuh"
#include "pdc_block/cuda/product.cuh"
#include "pdc_block/cuda/stencil.cuh"

namespace frd {

// Step s multiplies slab s while slab s + 1 becomes hidden values and slabs up to s + kStages arrive; half of
// the warps multiply first, so that the tensor cores and the arithmetic units are busy at the same time. One
// barrier a step: it ends the reads of the stage, of the hidden tile and of the weight slot that this step
// overwrites.
template <class T, bool kPixels, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, Tile::kBlocks) pdc_block_kernel(const BlockProduct a) {
  using S = BlockShape<T, kPixels, Tile>;
  constexpr int kStages = Tile::kStages;
  FRD_DYNAMIC_SHARED(uint4, shared_groups);  // aligned for vectors
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_groups);
  uint32_t* point = shared + 2 * S::kHiddenWords;
  uint32_t* stages = point + a.point_slots * S::kPointWords;
  const int stride = static_cast<int>(gridDim.x);
  const int first_out = static_cast<int>(blockIdx.y) * Tile::kOuts;
  const int first_tile = static_cast<int>(blockIdx.x);
  const int slabs = a.slabs.divisor;
  const int steps = (a.tiles - first_tile + stride - 1) / stride * slabs;
  const bool keep_point = a.point_slots >= slabs;  // the whole weight fits: it is read once
  const bool multiply_first = threadIdx.x / 128 % 2;
  const auto slab_of = [&](int step) { return step - a.slabs.quotient(step) * slabs; };
  const auto place_at = [&](int step) {
    return place_of<S>(a, first_tile + a.slabs.quotient(step) * stride);
  };

  using Product = TileProduct<T, S::kM, S::kN, Tile::kWarpM, Tile::kWarpN>;
  constexpr int kVector = Product::kVector;
  Product product;
  product.clear();
#pragma unroll 1
  for (int step = -kStages; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (const int next = step + kStages; next < steps)
      load_stage<S>(a, place_at(next), slab_of(next), stages + next % kStages * a.stage_words);
    if (const int next = step + kStages - 1; next >= 0 && next < (keep_point ? slabs : steps))
      load_point<S>(a, first_out, slab_of(next),
                    point + (keep_point ? next : next % kStages) * S::kPointWords);
    cp_async_commit();
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == multiply_first) {
        if (step < 0) continue;
        const uint32_t* hidden = shared + step % 2 * S::kHiddenWords;
        const uint32_t* weight = point + (keep_point ? slab_of(step) : step % kStages) * S::kPointWords;
        product.add(kPixels ? hidden : weight, kPixels ? weight : hidden);
        if (slab_of(step) < slabs - 1) continue;
        if (a.wide_out)
          product.finish(TileFinish<S, kVector, true>(a, place_at(step), first_out));
        else
          product.finish(TileFinish<S, kVector, false>(a, place_at(step), first_out));
        product.clear();
      } else if (const int next = step + 1; next >= 0 && next < steps) {
        make_hidden<S>(a, place_at(next), slab_of(next), stages + next % kStages * a.stage_words,
                       shared + next % 2 * S::kHiddenWords);
      }
    }
  }
}

}  // namespace frd
