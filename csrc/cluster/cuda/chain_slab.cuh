// Operands of products on tensor cores, in shared memory: bf16 parts of the numbers, in slabs of 64 along the
// depth. A slab of a matrix [outer, depth] holds rows [outer, 64], or if `across` rows [64, outer], for
// operands that are contiguous along `outer`.
#pragma once
#include "cluster/cuda/chain_product.h"
#include "cluster/cuda/rows.cuh"

namespace frd {
namespace chain {

constexpr int kSlab = 64, kGroup = 8;  // of the depth; numbers of 16 bytes
constexpr int kMaxParts = 3;

FRD_HD static inline int slab_bytes(int rows) { return rows * kSlab * 2; }

// Byte offset of a group in rows of 128 or 64 bytes, permuted so that eight neighbours along the column of
// groups lie in different banks.
FRD_DEVICE int group_at(int row, int group) { return row * 128 + ((group ^ (row & 7)) << 4); }
FRD_DEVICE int short_group_at(int row, int group) { return row * 64 + ((group ^ (row >> 1 & 3)) << 4); }

// An operand as [outer, depth], of each item; strides in elements.
struct Operand {
  const void* data;
  DType dtype;
  int64_t item, outer, depth;
  int outers, depths;
  int rows, parts;  // of a slab, 32 or 64; of a number, 1 to kMaxParts
  bool across, aligned;

  // An item's matrix from row `first` and `skipped` of the depth on.
  __device__ Operand from(int which, int first, int skipped) const {
    Operand o = *this;
    const int64_t elements = which * item + first * outer + skipped * depth;
    o.data = static_cast<const char*>(data) + elements * (dtype == DType::f32 ? 4 : 2);
    o.outers -= first;
    o.depths -= skipped;
    return o;
  }
};

// Byte offset of a number in its slab.
FRD_DEVICE int place_in_slab(const Operand& o, int outer, int depth) {
  if (!o.across) return group_at(outer, depth / kGroup) + depth % kGroup * 2;
  const int group = o.rows == 64 ? group_at(depth, outer / kGroup) : short_group_at(depth, outer / kGroup);
  return group + outer % kGroup * 2;
}

// An element, or the first one of a group: in the matrix, or -1 beyond it; behind the first slab; its row.
struct Place {
  int64_t from;
  int to, outer;
};

// The groups of a thread, where neighbours in memory follow each other. The block has half a slab of 64 rows,
// or one of 32, at a time.
class Groups {
 public:
  __device__ explicit Groups(const Operand& o) {
    const int i = threadIdx.x, bits = o.across && o.rows == 32 ? 2 : 3;
    const int along = (i & ((1 << bits) - 1)) * kGroup, other = i >> bits;
    outer_ = o.across ? along : other, depth_ = o.across ? other : along;
    from_ = outer_ * o.outer + depth_ * o.depth;
    to_ = place_in_slab(o, outer_, depth_);
  }
  static __device__ int count(const Operand& o, int slabs) { return o.rows == 64 ? 2 * slabs : slabs; }
  __device__ Place operator()(const Operand& o, int u) const {
    const int s = o.rows == 64 ? u / 2 : u, half = o.rows == 64 ? u % 2 : 0;
    const int outer = o.across ? 0 : 32 * half, depth = s * kSlab + (o.across ? 32 * half : 0);
    const bool inside = outer_ + outer < o.outers && depth_ + depth < o.depths;
    return {inside ? from_ + outer * o.outer + depth * o.depth : -1,
            to_ + (s * o.parts * (o.rows / 32) + half) * slab_bytes(32), outer_ + outer};
  }

 private:
  int64_t from_;
  int to_, outer_, depth_;
};

// The i-th element over the slabs, likewise.
FRD_DEVICE Place find(const Operand& o, int i) {
  const int row_bits = o.rows == 64 ? 6 : 5, inner_bits = o.across ? row_bits : 6;
  const int s = i >> (row_bits + 6), rest = i & ((kSlab << row_bits) - 1);
  const int along = rest & ((1 << inner_bits) - 1), other = rest >> inner_bits;
  const int outer = o.across ? along : other, in_slab = o.across ? other : along;
  const int depth = s * kSlab + in_slab;
  const bool inside = outer < o.outers && depth < o.depths;
  return {inside ? outer * o.outer + depth * o.depth : -1,
          s * o.parts * slab_bytes(o.rows) + place_in_slab(o, outer, in_slab), outer};
}

// Two numbers as the sum of parts of bf16, 8 bits each. The later parts of an infinity or NaN are NaN.
FRD_DEVICE void split(float a, float b, int parts, uint32_t (&part)[kMaxParts]) {
  FRD_UNROLL
  for (int p = 0; p < kMaxParts; ++p) {
    if (p >= parts) break;
    part[p] = pack<bf16>(a, b);
    float high_a, high_b;
    unpack<bf16>(part[p], high_a, high_b);
    a -= high_a, b -= high_b;
  }
}

// Eight neighbours, aligned to 16 bytes.
FRD_DEVICE void read_group(const Operand& o, int64_t at, float (&v)[kGroup]) {
  if (o.dtype == DType::f32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(o.data) + at);
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const f16*>(o.data) + at);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  FRD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (o.dtype == DType::f16)
      unpack<f16>(word[i], v[2 * i], v[2 * i + 1]);
    else
      unpack<bf16>(word[i], v[2 * i], v[2 * i + 1]);
  }
}
// The parts of eight numbers, each at to + its part * part_bytes.
FRD_DEVICE void write_group(const float (&v)[kGroup], int parts, char* to, int part_bytes) {
  uint32_t word[kGroup / 2][kMaxParts];
  FRD_UNROLL
  for (int i = 0; i < kGroup / 2; ++i) split(v[2 * i], v[2 * i + 1], parts, word[i]);
  FRD_UNROLL
  for (int p = 0; p < kMaxParts; ++p)
    if (p < parts)
      *reinterpret_cast<uint4*>(to + p * part_bytes) = {word[0][p], word[1][p], word[2][p], word[3][p]};
}

FRD_DEVICE void copy_groups(char* to, const Operand& o, int slabs) {
  const bf16* data = static_cast<const bf16*>(o.data);
  const Groups groups(o);
#pragma unroll 4
  for (int u = 0; u < Groups::count(o, slabs); ++u) {
    const Place at = groups(o, u);
    cp_async_16(to + at.to, data + (at.from < 0 ? 0 : at.from), at.from < 0 ? 0 : 16);
  }
}

template <int kFlight>
FRD_DEVICE void split_groups(char* to, const Operand& o, int slabs, const float* scale) {
  const Groups groups(o);
  const int count = Groups::count(o, slabs);
#pragma unroll 1
  for (int first = 0; first < count; first += kFlight) {
    float v[kFlight][kGroup] = {};
    Place at[kFlight];
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      at[u] = groups(o, first + u);
      if (first + u < count && at[u].from >= 0) read_group(o, at[u].from, v[u]);
    }
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      if (first + u >= count) break;
      FRD_UNROLL
      for (int e = 0; e < kGroup; ++e)
        if (scale) v[u][e] *= scale[at[u].outer + (o.across ? e : 0)];
      write_group(v[u], o.parts, to + at[u].to, slab_bytes(o.rows));
    }
  }
}

FRD_DEVICE uint32_t bits_at(const Operand& o, int64_t i) {
  return o.dtype == DType::f32 ? static_cast<const uint32_t*>(o.data)[i]
                               : static_cast<const uint16_t*>(o.data)[i];
}
FRD_DEVICE float number_of(uint32_t bits, DType dtype) {
  if (dtype == DType::f16) return load(f16{static_cast<uint16_t>(bits)});
  if (dtype == DType::bf16) bits <<= 16;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// As split_groups, for any strides and sizes.
FRD_DEVICE void split_elements(char* to, const Operand& o, int slabs, const float* scale) {
  constexpr int kFlight = 4;  // divides the elements of a thread
#pragma unroll 1
  for (int i = threadIdx.x; i < slabs * o.rows * kSlab; i += kFlight * kBlockThreads) {
    uint32_t bits[kFlight];
    Place at[kFlight];
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      at[u] = find(o, i + u * kBlockThreads);
      bits[u] = at[u].from < 0 ? 0 : bits_at(o, at[u].from);
    }
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      uint32_t part[kMaxParts];
      split(number_of(bits[u], o.dtype) * (scale ? scale[at[u].outer] : 1.f), 0.f, o.parts, part);
      FRD_UNROLL
      for (int p = 0; p < kMaxParts; ++p)
        if (p < o.parts)
          *reinterpret_cast<uint16_t*>(to + at[u].to + p * slab_bytes(o.rows)) =
              static_cast<uint16_t>(part[p]);
    }
  }
}

// to [slabs, parts, slab] = the operand's first slabs; scale: powers of 2 in shared memory that multiply its
// rows, or null. kFlight: groups that a thread has in registers. Without the wait for its copies, and a
// barrier.
template <int kFlight>
FRD_DEVICE void fetch_operand(char* to, const Operand& o, int slabs, const float* scale = nullptr) {
  if (!o.aligned)
    split_elements(to, o, slabs, scale);
  else if (o.dtype == DType::bf16 && !scale)
    copy_groups(to, o, slabs);
  else
    split_groups<kFlight>(to, o, slabs, scale);
}

// Fragment of mma_m16n8k16: a [16, 16] at (row, 16 k) of a slab of 32 rows.
template <bool kAcross>
FRD_DEVICE void left_fragment(uint32_t (&r)[4], const char* slab, int row, int k) {
  const int lane = lane_of_warp();
  if constexpr (kAcross)
    ldmatrix<4, true>(
        r, slab + short_group_at(16 * k + (lane & 7) + (lane >> 4) * 8, row / 8 + (lane >> 3 & 1)));
  else
    ldmatrix<4>(r, slab + group_at(row + (lane & 15), 2 * k + (lane >> 4)));
}
// Two fragments b [16, 8] of a slab of 64 rows, of the columns column .. + 8 (r[0], r[1]) and column + 8 .. +
// 16 (r[2], r[3]).
template <bool kAcross>
FRD_DEVICE void right_fragments(uint32_t (&r)[4], const char* slab, int column, int k) {
  const int lane = lane_of_warp();
  if constexpr (kAcross)
    ldmatrix<4, true>(r, slab + group_at(16 * k + (lane & 15), column / 8 + (lane >> 4)));
  else
    ldmatrix<4>(r, slab + group_at(column + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
}

// A tile [32, 64] for a block's warps, 16 x 16 each: the products of first parts, and those of a later part
// of the right and of the left operand.
using Sums = float[3][2][4];
FRD_DEVICE int tile_row() { return warp_of_block() / 4 * 16; }
FRD_DEVICE int tile_column() { return warp_of_block() % 4 * 16; }

// sums += left right over `count` slabs, of the parts i + j < most
template <bool kLeftAcross, bool kRightAcross>
FRD_DEVICE void multiply(Sums& sums, const char* left, int left_parts, const char* right, int right_parts,
                         int count, int most) {
  constexpr int kLeftBytes = kTileRows * kSlab * 2, kRightBytes = kTileColumns * kSlab * 2;
#pragma unroll 1
  for (int s = 0; s < count; ++s, left += left_parts * kLeftBytes, right += right_parts * kRightBytes) {
#pragma unroll 2
    for (int k = 0; k < kSlab / 16; ++k) {
      // Fragments that are read on a condition live no longer than it, or they would take registers all
      // along.
      FRD_UNROLL
      for (int i = 0; i < kMaxParts; ++i) {
        if (i >= left_parts) break;
        uint32_t a[4];
        left_fragment<kLeftAcross>(a, left + i * kLeftBytes, tile_row(), k);
        FRD_UNROLL
        for (int j = 0; i + j < kMaxParts; ++j) {
          if (j >= right_parts || i + j >= most) break;
          uint32_t b[4];
          right_fragments<kRightAcross>(b, right + j * kRightBytes, tile_column(), k);
          float (&to)[2][4] = sums[i > 0 ? 2 : j > 0 ? 1 : 0];
          mma_m16n8k16<bf16>(to[0], a, b[0], b[1]);
          mma_m16n8k16<bf16>(to[1], a, b[2], b[3]);
        }
      }
    }
  }
}
FRD_DEVICE void multiply_any(Sums& sums, const Operand& a, const char* left, const Operand& b,
                             const char* right, int count, int most) {
  if (a.across && b.across)
    multiply<true, true>(sums, left, a.parts, right, b.parts, count, most);
  else if (a.across)
    multiply<true, false>(sums, left, a.parts, right, b.parts, count, most);
  else if (b.across)
    multiply<false, true>(sums, left, a.parts, right, b.parts, count, most);
  else
    multiply<false, false>(sums, left, a.parts, right, b.parts, count, most);
}

// The tile in shared memory: [32, kTilePitch], with rows that begin in banks 8 apart for the fragments'
// pairs.
constexpr int kTilePitch = kTileColumns + 8, kTileFloats = kTileRows * kTilePitch;
FRD_DEVICE void write_sums(const Sums& sums, float* tile) {
  const int lane = lane_of_warp();
  FRD_UNROLL
  for (int j = 0; j < 2; ++j) FRD_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = 2 * half, row = tile_row() + half * 8 + lane / 4;
    *reinterpret_cast<float2*>(tile + row * kTilePitch + tile_column() + 8 * j + lane % 4 * 2) = {
        sums[0][j][i] + (sums[1][j][i] + sums[2][j][i]),
        sums[0][j][i + 1] + (sums[1][j][i + 1] + sums[2][j][i + 1])};
  }
}

// Parts of a number of a dtype.
inline int parts_of(DType dtype, int float_parts) {
  return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : float_parts;
}

// m's data and items with these strides; rows: of its slabs
inline Operand operand_of(const Matrix& m, int64_t outer, int64_t depth, int outers, int depths, int rows,
                          int parts) {
  Operand o{m.data, m.dtype, m.item, outer, depth, outers, depths, rows, parts, false, false};
  o.across = depth != 1 && outer == 1;
  const int64_t group = m.dtype == DType::f32 ? 4 : 8;
  o.aligned = (o.across ? outer : depth) == 1 && (o.across ? outers : depths) % kGroup == 0 &&
              (o.across ? depth : outer) % group == 0 && m.item % group == 0 &&
              reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  return o;
}

}  // namespace chain
}  // namespace frd
