// The block for images that would leave most of the GPU idle: a thread block computes one small tile, and
// copies what it needs of the whole reduction at once, so that a launch waits for memory once.
#pragma once
#include "core/dependent_launch.cuh"
#include "pdc_block/cuda/block.cuh"

namespace frd {

struct AtOnceTile {
  static constexpr int kRows = 2;
  static constexpr int kColumns = 8;
  static constexpr int kOuts = 32;
  static constexpr int kWarps = 8;
  static constexpr int kWarpM = 16;
  static constexpr int kWarpN = 8;
  static constexpr int kBlocks = 2;
  static constexpr int kStripRows = 2;
};

// Shared memory of one slab: its hidden values, 1x1 weight and stage.
template <class S>
constexpr int slab_bytes(int reach) {
  return 4 * (S::kHiddenWords + S::kPointWords + S::stage_words(reach));
}

// The hidden values of `count` slabs, from their stages.
template <class S>
FRD_DEVICE void make_hidden_of(const BlockProduct& a, const TilePosition& position, int first, int count,
                               const uint32_t* stages, uint32_t* hidden) {
  if (a.prologue == Prologue::gather) {
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      gather_hidden<S>(a, position, (first + i) * S::kSlab, stencil_of<S>(a, stages + i * a.stage_words),
                       hidden + i * S::kHiddenWords);
    return;
  }
#pragma unroll 1
  for (int strip = threadIdx.x / 32; strip < count * S::kStrips; strip += S::Tile::kWarps) {
    const int i = strip / S::kStrips;
    const uint32_t* stage = stages + i * a.stage_words;
    make_strip<S>(a.prologue, stage, stencil_of<S>(a, stage), strip % S::kStrips,
                  hidden + i * S::kHiddenWords);
  }
}

// out = relu(stencil(x)) point^T (+ bias) (+ residual) for tile blockIdx.x and the kOuts channels blockIdx.y.
// If shared memory cannot hold all slabs, they come in several passes; the order of the sums is the same.
template <class T, bool kChannelsLast, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, Tile::kBlocks)
    pdc_block_at_once_kernel(const BlockProduct a) {
  using S = BlockShape<T, kChannelsLast, Tile>;
  // Half the rows in float32, so that all warps have a part of the product.
  constexpr int kWarpM = sizeof(T) == 4 ? Tile::kWarpM / 2 : Tile::kWarpM;
  using Product = TileProduct<T, S::kM, S::kN, kWarpM, Tile::kWarpN>;
  const bool multiplies = threadIdx.x / 32 < S::kM / kWarpM * (S::kN / Tile::kWarpN);
  // uint4 aligns the shared memory for vectors.
  FRD_DYNAMIC_SHARED(uint4, shared_groups);
  uint32_t* hidden = reinterpret_cast<uint32_t*>(shared_groups);
  uint32_t* point = hidden + a.slots * S::kHiddenWords;
  uint32_t* stages = point + a.slots * S::kPointWords;
  const TilePosition position = position_of<S>(a, static_cast<int>(blockIdx.x));
  const int first_out = static_cast<int>(blockIdx.y) * Tile::kOuts;
  const int slabs = a.slabs.divisor;
  // Nothing is read before: any operand may come from the previous kernel.
  wait_for_previous();
  let_next_start();
  Product product;
  product.clear();
#pragma unroll 1
  for (int first = 0; first < slabs; first += a.slots) {
    const int count = first + a.slots < slabs ? a.slots : slabs - first;
    // The last pass has been multiplied.
    if (first > 0) __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; ++i) load_stage<S>(a, position, first + i, stages + i * a.stage_words);
    cp_async_commit();
#pragma unroll 1
    for (int i = 0; i < count; ++i) load_point<S>(a, first_out, first + i, point + i * S::kPointWords);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    make_hidden_of<S>(a, position, first, count, stages, hidden);
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count && multiplies; ++i) {
      const uint32_t* values = hidden + i * S::kHiddenWords;
      const uint32_t* weight = point + i * S::kPointWords;
      product.add(kChannelsLast ? values : weight, kChannelsLast ? weight : values);
    }
  }
  if (!multiplies) return;
  if (a.vectorized_out)
    product.finish(TileEpilogue<S, Product::kVector, true>(a, position, first_out));
  else
    product.finish(TileEpilogue<S, Product::kVector, false>(a, position, first_out));
}

template <class T, bool kChannelsLast>
cudaError_t launch_at_once(const BlockProductArgs& args, const CudaLimits& limits, cudaStream_t stream) {
  using Tile = AtOnceTile;
  using S = BlockShape<T, kChannelsLast, Tile>;
  BlockProduct a = prepare<S>(args);
  const int outs = block_count(a.out_channels, Tile::kOuts);
  // More blocks than multiprocessors hide each other's copies, if two fit.
  const int resident = int64_t{a.tiles} * outs > limits.multiprocessors ? Tile::kBlocks : 1;
  const int slots = shared_room(resident, limits) / slab_bytes<S>(a.reach);
  a.slots = slots < a.slabs.divisor ? slots : a.slabs.divisor;
  const int shared = a.slots * slab_bytes<S>(a.reach);
  const auto kernel = pdc_block_at_once_kernel<T, kChannelsLast, Tile>;
  return FRD_LAUNCH_DEPENDENT(kernel, dim3(a.tiles, outs), dim3(S::kThreads), shared, stream, a);
}

}  // namespace frd
