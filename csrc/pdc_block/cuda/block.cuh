// The fused block and its launcher: out = relu(stencil(x)) point^T (+ bias) (+ residual). The stencil is the
// prologue of a matrix product, and its tile of hidden values never leaves shared memory.
#pragma once
#include "core/cuda_device.h"
#include "pdc_block/cuda/load.cuh"
#include "pdc_block/cuda/product.cuh"
#include "pdc_block/cuda/stencil.cuh"

namespace frd {

// kVector consecutive elements of T, as words.
template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Vector {
  static constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
};

template <class T, int kVector>
FRD_DEVICE void unpack_vector(const Vector<T, kVector>& from, float (&v)[kVector]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) unpack<T>(from.words[i / 2], v[i], v[i + 1]);
  } else {
    memcpy(v, from.words, sizeof(v));
  }
}
template <class T, int kVector>
FRD_DEVICE Vector<T, kVector> pack_vector(const float (&v)[kVector]) {
  Vector<T, kVector> to;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kVector; i += 2) to.words[i / 2] = pack<T>(v[i], v[i + 1]);
  } else {
    memcpy(to.words, v, sizeof(v));
  }
  return to;
}

// The first `count` elements; if kVectorized all of them at once.
template <bool kVectorized, class T, int kVector>
FRD_DEVICE void load_vector(const T* from, int count, Vector<T, kVector>& to) {
  if constexpr (kVectorized) {
    to = *reinterpret_cast<const Vector<T, kVector>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) reinterpret_cast<T*>(to.words)[i] = from[i];
  }
}
template <bool kVectorized, class T, int kVector>
FRD_DEVICE void store_vector(const Vector<T, kVector>& from, int count, T* to) {
  if constexpr (kVectorized) {
    *reinterpret_cast<Vector<T, kVector>*>(to) = from;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) to[i] = reinterpret_cast<const T*>(from.words)[i];
  }
}

// A vector of outputs: its offset in the image, or -1 if it is outside, and the residual or gate there.
template <class T, int kVector>
struct PendingVector {
  int at, count;
  Vector<T, kVector> extra;
};

// Epilogue of one tile: bias, residual or gate, one rounding, the store. kVectorized: by whole aligned
// vectors.
template <class S, int kVector, bool kVectorized>
struct TileEpilogue {
  using T = typename S::T;
  const BlockProduct& a;
  int y0, x0, first_out;
  const T* extra;
  T* out;

  __device__ __forceinline__ TileEpilogue(const BlockProduct& product, const TilePosition& position,
                                          int first)
      : a(product), y0(position.y), x0(position.x), first_out(first) {
    const int64_t image = position.image * a.out_channels * a.out_height * a.out_width;
    extra = a.extra ? static_cast<const T*>(a.extra) + image : nullptr;
    out = static_cast<T*>(a.out) + image;
  }

  // Loads what the vector at (row, column) of the product needs, so that several loads are in flight at once.
  __device__ __forceinline__ PendingVector<T, kVector> prefetch(int row, int column) const {
    const int pixel = S::kChannelsLast ? row : column;
    const int channel = first_out + (S::kChannelsLast ? column : row);
    const int y = y0 + pixel / S::Tile::kColumns;
    const int x = x0 + pixel % S::Tile::kColumns;
    PendingVector<T, kVector> p{-1, kVector, {}};
    if (y >= a.out_height || x >= a.out_width || channel >= a.out_channels) return p;
    p.at = S::kChannelsLast ? (y * a.out_width + x) * a.out_channels + channel
                            : (channel * a.out_height + y) * a.out_width + x;
    if constexpr (!kVectorized) {
      const int left = S::kChannelsLast ? a.out_channels - channel : a.out_width - x;
      if (left < kVector) p.count = left;
    }
    if (extra) load_vector<kVectorized>(extra + p.at, p.count, p.extra);
    return p;
  }

  __device__ __forceinline__ void store(int row, int column, float (&v)[kVector],
                                        const PendingVector<T, kVector>& p) const {
    if (p.at < 0) return;
    if (a.point_bias) add_bias(first_out + (S::kChannelsLast ? column : row), p.count, v);
    if (extra) {
      float e[kVector];
      unpack_vector<T>(p.extra, e);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        // A gate of NaN lets v through, as in torch's ReLU.
        v[i] = a.gate ? (e[i] <= 0 ? 0.f : v[i]) : v[i] + e[i];
    }
    store_vector<kVectorized>(pack_vector<T>(v), p.count, out + p.at);
  }

  __device__ __forceinline__ void add_bias(int channel, int count, float (&v)[kVector]) const {
    const T* from = static_cast<const T*>(a.point_bias) + channel;
    if constexpr (S::kChannelsLast) {
      Vector<T, kVector> bias{};
      load_vector<kVectorized>(from, count, bias);
      float b[kVector];
      unpack_vector<T>(bias, b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += b[i];
    } else {
      const float b = load(*from);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += b;
    }
  }
};

// out = relu(stencil(x)) point^T (+ bias) (+ residual). Step s multiplies slab s, computes the hidden values
// of slab s + 1 and copies slab s + kStages. Half of the warps multiply first, so that tensor cores and
// arithmetic units are busy at the same time. One barrier per step ends all reads of the stage, the hidden
// tile and the weight slot that the step overwrites.
template <class T, bool kChannelsLast, class Tile>
__global__ void __launch_bounds__(Tile::kWarps * 32, Tile::kBlocks) pdc_block_kernel(const BlockProduct a) {
  using S = BlockShape<T, kChannelsLast, Tile>;
  constexpr int kStages = Tile::kStages;
  // uint4 aligns the shared memory for vectors.
  FRD_DYNAMIC_SHARED(uint4, shared_groups);
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_groups);
  uint32_t* point = shared + 2 * S::kHiddenWords;
  uint32_t* stages = point + a.slots * S::kPointWords;
  const int stride = static_cast<int>(gridDim.x);
  const int first_out = static_cast<int>(blockIdx.y) * Tile::kOuts;
  const int first_tile = static_cast<int>(blockIdx.x);
  const int slabs = a.slabs.divisor;
  const int steps = (a.tiles - first_tile + stride - 1) / stride * slabs;
  // If the whole 1x1 weight fits shared memory, it is read once.
  const bool keep_point = a.slots >= slabs;
  const bool multiply_first = threadIdx.x / 128 % 2;
  const auto slab_of = [&](int step) { return step - a.slabs.quotient(step) * slabs; };
  const auto position_at = [&](int step) {
    return position_of<S>(a, first_tile + a.slabs.quotient(step) * stride);
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
      load_stage<S>(a, position_at(next), slab_of(next), stages + next % kStages * a.stage_words);
    if (const int next = step + kStages - 1; next >= 0 && next < (keep_point ? slabs : steps))
      load_point<S>(a, first_out, slab_of(next),
                    point + (keep_point ? next : next % kStages) * S::kPointWords);
    cp_async_commit();
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if ((phase == 0) == multiply_first) {
        if (step < 0) continue;
        const uint32_t* hidden = shared + step % 2 * S::kHiddenWords;
        const uint32_t* weight = point + (keep_point ? slab_of(step) : step % kStages) * S::kPointWords;
        product.add(kChannelsLast ? hidden : weight, kChannelsLast ? weight : hidden);
        if (slab_of(step) < slabs - 1) continue;
        if (a.vectorized_out)
          product.finish(TileEpilogue<S, kVector, true>(a, position_at(step), first_out));
        else
          product.finish(TileEpilogue<S, kVector, false>(a, position_at(step), first_out));
        product.clear();
      } else if (const int next = step + 1; next >= 0 && next < steps) {
        make_hidden<S>(a, position_at(next), slab_of(next), stages + next % kStages * a.stage_words,
                       shared + next % 2 * S::kHiddenWords);
      }
    }
  }
}

// Shared memory that each of `blocks` resident blocks can have.
inline int shared_room(int blocks, const CudaLimits& limits) {
  // CUDA reserves this much per block.
  constexpr int kReserved = 1024;
  const int room = limits.shared_per_multiprocessor / blocks - kReserved;
  return room < limits.shared_per_block ? room : limits.shared_per_block;
}

// Slots for slabs of the 1x1 weight: one for each slab if kBlocks thread blocks have room for that, else
// kStages.
template <class S>
int point_slots(int slabs, int reach, const CudaLimits& limits) {
  const int max_bytes = shared_room(S::Tile::kBlocks, limits);
  return slabs > S::Tile::kStages && S::shared_bytes(reach, slabs) <= max_bytes ? slabs : S::Tile::kStages;
}

inline int reach_of(Prologue p) {
  return p == Prologue::copy || p == Prologue::gather ? 0 : p == Prologue::radial ? 2 : 1;
}

template <class S>
BlockProduct prepare(const BlockProductArgs& args) {
  using T = typename S::T;
  constexpr int kSize = sizeof(T);
  BlockProduct a{};
  static_cast<BlockProductArgs&>(a) = args;
  a.extra = a.gate ? a.gate : a.residual;
  a.reach = reach_of(a.prologue);
  a.left_halo = S::left_halo(a.reach);
  a.slabs = Divider(block_count(a.channels, S::kSlab));
  a.halo_rows = S::halo_rows(a.reach);
  a.halo_columns = Divider(S::halo_columns(a.reach));
  a.stage_words = S::stage_words(a.reach);
  const int tiles_x = block_count(a.out_width, S::Tile::kColumns);
  const int tiles_y = block_count(a.out_height, S::Tile::kRows);
  a.tiles_x = Divider(tiles_x);
  a.tiles_of_image = Divider(tiles_x * tiles_y);
  a.tiles = static_cast<int>(a.batch * tiles_x * tiles_y);
  const bool whole_channels = a.channels * kSize % 16 == 0;
  a.vectorized_x = S::kChannelsLast ? whole_channels && aligned(a.x, 16)
                                    : !S::kPaired || (a.width % 2 == 0 && aligned(a.x, 4));
  a.vectorized_stencil = aligned(a.stencil, 16) && aligned(a.stencil_bias, 16);
  a.vectorized_point = whole_channels && aligned(a.point, 16);
  constexpr int kVector = TileProduct<T, S::kM, S::kN, S::Tile::kWarpM, S::Tile::kWarpN>::kVector;
  a.vectorized_out = (S::kChannelsLast ? a.out_channels : a.out_width) % kVector == 0;
  for (const void* p : {static_cast<const void*>(a.out), a.extra, S::kChannelsLast ? a.point_bias : nullptr})
    a.vectorized_out = a.vectorized_out && aligned(p, kVector * kSize);
  return a;
}

template <class T, bool kChannelsLast, class Tile>
cudaError_t launch_product(const BlockProductArgs& args, const CudaLimits& limits, cudaStream_t stream) {
  using S = BlockShape<T, kChannelsLast, Tile>;
  BlockProduct a = prepare<S>(args);
  a.slots = point_slots<S>(a.slabs.divisor, a.reach, limits);
  const int shared = S::shared_bytes(a.reach, a.slots);
  const int outs = block_count(a.out_channels, Tile::kOuts);
  const auto kernel = pdc_block_kernel<T, kChannelsLast, Tile>;
  if (const cudaError_t error = allow_shared_memory(kernel, shared)) return error;
  const int resident = limits.multiprocessors * Tile::kBlocks / outs;
  const int columns = a.tiles < resident ? a.tiles : resident < 1 ? 1 : resident;
  FRD_LAUNCH(kernel, dim3(columns, outs), dim3(S::kThreads), shared, stream, a);
  return cudaGetLastError();
}

}  // namespace frd
