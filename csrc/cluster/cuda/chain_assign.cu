// Round 1: cosines of 32 tokens with all centres, their labels, the matrix of cosines.
#include <algorithm>

#include "cluster/cuda/chain_plan.h"
#include "cluster/cuda/chain_rules.cuh"
#include "cluster/cuda/chain_slab.cuh"

namespace frd {
namespace chain {

// Where the keys are made here: at most so many channels; parts of a key and a pooled key, enough for the
// cosines of 64 channels and more (error of a key 2^-16).
constexpr int kFusedChannels = 256, kFusedParts = 2;

// The launch: keys and pooled keys as operands, x and the weight where the keys are made here.
struct AssignPlan {
  Operand keys, pooled;  // [N, C] of each item; [O, C]
  Operand x, weight;     // fused: [N, C], [C, C]
  int window;            // slabs in shared memory at a time
  int weight_window;     // of the weight
  int float_parts;
  int tiles;  // of an item's tokens
};

struct AssignShared {
  float tile[kTileFloats];
  float partial[kBlockWarps * kTileColumns];
  // Of 1 / norm the power of 2 that multiplies a row before the product, so that nothing in it overflows or
  // underflows, and what is left for behind it.
  float token_scale[kTileRows], token_rest[kTileRows];
  float centre_scale[kTileColumns], centre_rest[kTileColumns];
  float token_inverse[kTileRows];
};

// The power of 2 below; 0, infinity and NaN as 0, infinity and infinity.
FRD_DEVICE float power_of(float inverse) {
  uint32_t bits;
  memcpy(&bits, &inverse, 4);
  bits &= 0x7f800000u;
  float power;
  memcpy(&power, &bits, 4);
  return power;
}
FRD_DEVICE void set_scale(float inverse, float* scale, float* rest) {
  const float power = power_of(inverse);
  *scale = power;
  *rest = power > 0 ? inverse / power : 1.f;
}

// squares [rows], one a thread of the first ones, of the operand's rows; a barrier at the end.
FRD_DEVICE float sum_squares(const Operand& o, float* partial) {
  const int warp = warp_of_block(), lane = lane_of_warp();
  if (!o.across) {
    for (int row = warp; row < o.rows; row += kBlockWarps) {
      float sum = 0;
#pragma unroll 4
      for (int c = lane; c < o.depths && row < o.outers; c += 32) {
        const float v = number_of(bits_at(o, row * o.outer + c * o.depth), o.dtype);
        sum += v * v;
      }
      sum = warp_sum(sum);
      if (lane == 0) partial[row] = sum;
    }
    __syncthreads();
    return static_cast<int>(threadIdx.x) < o.rows ? partial[threadIdx.x] : 0.f;
  }
  for (int row = lane; row < o.rows; row += 32) {
    float sum = 0;
#pragma unroll 4
    for (int c = warp; c < o.depths && row < o.outers; c += kBlockWarps) {
      const float v = number_of(bits_at(o, row * o.outer + c * o.depth), o.dtype);
      sum += v * v;
    }
    partial[warp * kTileColumns + row] = sum;
  }
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < kBlockWarps && static_cast<int>(threadIdx.x) < o.rows; ++w)
    sum += partial[w * kTileColumns + threadIdx.x];
  return sum;
}

// The scales of the centres from `first` on, and their inverse norms to `saved` by the item's first block.
FRD_DEVICE void scale_centres(const Forward& a, const Operand& pooled, int64_t item, int first, bool begins,
                              AssignShared& s) {
  const int i = threadIdx.x, o = first + i, centres = a.round[0].centres();
  float square = 0;
  if (a.square_tiles == 0) {
    square = sum_squares(pooled, s.partial);
  } else if (i < kTileColumns && o < centres) {
    for (int t = 0; t < a.square_tiles; ++t)
      square += a.pooled_squares[(item * a.square_tiles + t) * centres + o];
  }
  if (i >= kTileColumns) return;
  const float inverse = inverse_norm(sqrtf(square));
  set_scale(inverse, s.centre_scale + i, s.centre_rest + i);
  if (begins && o < centres) a.saved[item * a.at.size + a.at.round[0].pooled_inv_norm + o] = inverse;
}

// Tokens of a block; a masked one counts for nothing.
struct AssignTile {
  int64_t item;
  int first, count;
};
FRD_DEVICE bool takes_part(const Forward& a, int64_t item, int token) {
  return !a.mask || in_global(a.mask)[item * a.mask_batch + token * a.mask_token];
}

// The tile's scores as cosines, to the matrix; of each row the best one of a lane.
FRD_DEVICE void meet_tile(const Forward& a, const AssignTile& t, int first_centre, float order,
                          const AssignShared& s, Best (&best)[kTileRows / kBlockWarps]) {
  const int centres = a.round[0].centres();
  float* const matrix = a.saved + t.item * a.at.size + a.at.round[0].matrix;
  FRD_UNROLL
  for (int u = 0; u < kTileRows / kBlockWarps; ++u) {
    const int row = warp_of_block() * (kTileRows / kBlockWarps) + u;
    if (row >= t.count) break;
    FRD_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int column = lane_of_warp() + 32 * e, o = first_centre + column;
      if (o >= centres) break;
      const float cosine = s.tile[row * kTilePitch + column] * s.centre_rest[column] * s.token_rest[row];
      best[u].meet(order, cosine, o);
      if (a.dense) matrix[static_cast<int64_t>(t.first + row) * centres + o] = cosine;
    }
  }
}

// The best centre of each token from those of the lanes.
FRD_DEVICE void write_labels(const Forward& a, const AssignTile& t, float order, const AssignShared& s,
                             Best (&best)[kTileRows / kBlockWarps]) {
  float* const saved = a.saved + t.item * a.at.size;
  FRD_UNROLL
  for (int bit = 1; bit < 32; bit *= 2) FRD_UNROLL
  for (Best& b : best) b.meet_lane(order, bit);
  FRD_UNROLL
  for (int u = 0; u < kTileRows / kBlockWarps; ++u) {
    const int row = warp_of_block() * (kTileRows / kBlockWarps) + u, n = t.first + row;
    if (lane_of_warp() != u || row >= t.count) continue;
    const bool live = takes_part(a, t.item, n);
    const float cosine = live ? best[u].cosine : 0.f;
    a.labels[t.item * a.label_stride + a.round[0].labels + n] = live ? best[u].centre : -1;
    saved[a.at.round[0].cosine + n] = cosine;
    saved[a.at.round[0].inv_norm + n] = live ? s.token_inverse[row] : 0.f;
    if (a.similarity)
      a.similarity[t.item * a.round[0].tokens() + n] = live && a.weighted ? gate_of(a, 0, cosine) : cosine;
  }
}

FRD_DEVICE void wait_for_copies(int groups_behind) {
  if (groups_behind >= 3)
    cp_async_wait<3>();
  else if (groups_behind == 2)
    cp_async_wait<2>();
  else if (groups_behind == 1)
    cp_async_wait<1>();
  else
    cp_async_wait<0>();
}

// x and the weight are of 16 bits, one part each.
FRD_DEVICE void fetch_bf16(char* to, const Operand& o) {
  if (o.aligned)
    copy_groups(to, o, 1);
  else
    split_elements(to, o, 1, nullptr);
}

// keys = x Wk^T + bk for 32 tokens: a warp has 16 columns of every 64, as the tiles of products.
using KeySums = float[kFusedChannels / kTileColumns][2][4];

template <bool kAcross>
FRD_DEVICE void multiply_keys(KeySums& sums, const char* x, const char* weight, int blocks) {
  FRD_UNROLL
  for (int k = 0; k < kSlab / 16; ++k) {
    uint32_t a[4];
    left_fragment<kAcross>(a, x, tile_row(), k);
    FRD_UNROLL
    for (int b = 0; b < kFusedChannels / kTileColumns; ++b) {
      if (b >= blocks) break;
      uint32_t w[4];
      right_fragments<false>(w, weight + b * slab_bytes(kTileColumns), tile_column(), k);
      mma_m16n8k16<bf16>(sums[b][0], a, w[0], w[1]);
      mma_m16n8k16<bf16>(sums[b][1], a, w[2], w[3]);
    }
  }
}
// memory: x [C / 64, slab], weight [weight_window, C / 64, slab]. Reads inputs of the operator alone.
FRD_DEVICE void project_tokens(const AssignPlan& p, const AssignTile& t, const bf16* bias, char* memory,
                               KeySums& sums) {
  const int blocks = p.weight.outers / kTileColumns, slabs = blocks;
  FRD_UNROLL
  for (int b = 0; b < kFusedChannels / kTileColumns; ++b) FRD_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int c = b * kTileColumns + tile_column() + i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2;
    const float v = b < blocks ? load(bias[c]) : 0.f;
    sums[b][i / 2][i % 2] = sums[b][i / 2][2 + i % 2] = v;
  }
  const int weight_at = slabs * slab_bytes(kTileRows), weight_bytes = blocks * slab_bytes(kTileColumns);
  for (int begin = 0; begin < slabs; begin += p.weight_window) {
    const int count = slabs - begin < p.weight_window ? slabs - begin : p.weight_window;
    if (begin > 0) __syncthreads();
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
#pragma unroll 1
      for (int b = -1; b < blocks; ++b) {  // x, then the weight: a loop, as the code is long
        const int to = b < 0 ? (begin + s) * slab_bytes(kTileRows)
                             : weight_at + s * weight_bytes + b * slab_bytes(kTileColumns);
        const Operand& all = b < 0 ? p.x : p.weight;
        fetch_bf16(memory + to, all.from(b < 0 ? static_cast<int>(t.item) : 0,
                                         b < 0 ? t.first : b * kTileColumns, (begin + s) * kSlab));
      }
      cp_async_commit();
    }
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      wait_for_copies(count - 1 - s);
      __syncthreads();
      const char* const x = memory + (begin + s) * slab_bytes(kTileRows);
      const char* const weight = memory + weight_at + s * weight_bytes;
      if (p.x.across)
        multiply_keys<true>(sums, x, weight, blocks);
      else
        multiply_keys<false>(sums, x, weight, blocks);
    }
  }
}

// The keys from the sums: their norms and scales, and their parts [C / 64, parts, slab]. A barrier before the
// parts are written: what the sums were made of may lie there.
FRD_DEVICE void finish_keys(const Forward& a, KeySums& sums, char* to, AssignShared& s) {
  const int lane = lane_of_warp(), blocks = a.channels / kTileColumns;
  FRD_UNROLL
  for (int half = 0; half < 2; ++half) {
    float square = 0;
    FRD_UNROLL
    for (int b = 0; b < kFusedChannels / kTileColumns; ++b) FRD_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float v = sums[b][i / 2][2 * half + i % 2];
      square += v * v;
    }
    square += __shfl_xor_sync(0xffffffffu, square, 1);
    square += __shfl_xor_sync(0xffffffffu, square, 2);
    if (lane % 4 == 0) s.partial[warp_of_block() % 4 * kTileRows + tile_row() + half * 8 + lane / 4] = square;
  }
  __syncthreads();
  if (threadIdx.x < kTileRows) {
    float square = 0;
    for (int w = 0; w < 4; ++w) square += s.partial[w * kTileRows + threadIdx.x];
    const float inverse = inverse_norm(sqrtf(square));
    s.token_inverse[threadIdx.x] = inverse;
    set_scale(inverse, s.token_scale + threadIdx.x, s.token_rest + threadIdx.x);
  }
  __syncthreads();
  FRD_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = tile_row() + half * 8 + lane / 4;
    const float scale = s.token_scale[row];
    FRD_UNROLL
    for (int b = 0; b < kFusedChannels / kTileColumns; ++b) FRD_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (b >= blocks) break;
      uint32_t part[kMaxParts];
      split(sums[b][j][2 * half] * scale, sums[b][j][2 * half + 1] * scale, kFusedParts, part);
      const int group = tile_column() / kGroup + j;
      char* const at = to + b * kFusedParts * slab_bytes(kTileRows) + group_at(row, group) + lane % 4 * 4;
      FRD_UNROLL
      for (int p = 0; p < kFusedParts; ++p)
        *reinterpret_cast<uint32_t*>(at + p * slab_bytes(kTileRows)) = part[p];
    }
  }
}

// The scale of given keys.
FRD_DEVICE void scale_tokens(const Operand& keys, AssignShared& s) {
  const float square = sum_squares(keys, s.partial);
  if (threadIdx.x >= kTileRows) return;
  const float inverse = inverse_norm(sqrtf(square));
  s.token_inverse[threadIdx.x] = inverse;
  set_scale(inverse, s.token_scale + threadIdx.x, s.token_rest + threadIdx.x);
}

// sums = keys pooled^T of the tile and the centres from `first` on. keys: parts of the tile's keys, all of
// them if fused, else where a window of them comes to; pooled: a window of those of the centres.
template <bool kFused>
FRD_DEVICE void score_centres(const AssignPlan& p, const AssignTile& t, int first, char* keys, char* pooled,
                              const AssignShared& s, Sums& sums) {
  const int item = static_cast<int>(t.item), slabs = (p.keys.depths + kSlab - 1) / kSlab;
#pragma unroll 1
  for (int begin = 0; begin < slabs; begin += p.window) {
    const int count = slabs - begin < p.window ? slabs - begin : p.window;
    __syncthreads();
    if constexpr (kFused) {
      Operand o = p.pooled.from(item, first, begin * kSlab);
      // As the plan has it, but known to the compiler.
      o.dtype = DType::f32, o.rows = kTileColumns, o.parts = kFusedParts, o.across = false;
      split_groups<8>(pooled, o, count, s.centre_scale);
      __syncthreads();
      multiply<false, false>(sums, keys + begin * kFusedParts * slab_bytes(kTileRows), kFusedParts, pooled,
                             kFusedParts, count, kFusedParts);
    } else {
      const bool again = first == 0 || p.window < slabs;
      // A loop, as the code is long.
#pragma unroll 1
      for (int side = again ? 0 : 1; side < 2; ++side) {
        const Operand o =
            side == 0 ? p.keys.from(item, t.first, begin * kSlab) : p.pooled.from(item, first, begin * kSlab);
        fetch_operand<4>(side == 0 ? keys : pooled, o, count, side == 0 ? s.token_scale : s.centre_scale);
      }
      __syncthreads();
      if (p.keys.across)
        multiply<true, false>(sums, keys, p.keys.parts, pooled, p.pooled.parts, count, p.float_parts);
      else
        multiply<false, false>(sums, keys, p.keys.parts, pooled, p.pooled.parts, count, p.float_parts);
    }
  }
}

// cosine [N, O] = (key . pooled) / (|key| |pooled|), label = arg-max of order * cosine
template <bool kFused>
__global__ void __launch_bounds__(kBlockThreads, 1)
    assign_kernel(const __grid_constant__ Forward a, const __grid_constant__ AssignPlan p) {
  FRD_DYNAMIC_SHARED(uint4, shared_groups);
  __shared__ AssignShared s;
  char* const memory = reinterpret_cast<char*>(shared_groups);
  const int slabs = (a.channels + kSlab - 1) / kSlab, centres = a.round[0].centres();
  AssignTile t{blockIdx.x / p.tiles, static_cast<int>(blockIdx.x % p.tiles) * kTileRows, 0};
  t.count = a.round[0].tokens() - t.first < kTileRows ? a.round[0].tokens() - t.first : kTileRows;
  const int item = static_cast<int>(t.item);
  // fused: x, then the weight or the keys' parts and those of the pooled keys
  char* const keys = kFused ? memory + slabs * slab_bytes(kTileRows) : memory;
  char* const pooled = keys + (kFused ? slabs : p.window) * p.keys.parts * slab_bytes(kTileRows);
  if constexpr (kFused) {
    KeySums key_sums;
    project_tokens(p, t, static_cast<const bf16*>(a.round[0].key_bias), memory, key_sums);
    __syncthreads();
    finish_keys(a, key_sums, keys, s);
  }
  wait_for_previous();
  let_next_start();
  if constexpr (!kFused) scale_tokens(p.keys.from(item, t.first, 0), s);
  const float order = order_of(a, 0);
  Best best[kTileRows / kBlockWarps];
  FRD_UNROLL
  for (Best& b : best) b = {0.f, Best::kNone};
#pragma unroll 1
  for (int first = 0; first < centres; first += kTileColumns) {
    __syncthreads();
    scale_centres(a, p.pooled.from(item, first, 0), t.item, first, t.first == 0, s);
    Sums sums{};
    score_centres<kFused>(p, t, first, keys, pooled, s, sums);
    write_sums(sums, s.tile);
    __syncthreads();
    meet_tile(a, t, first, order, s, best);
  }
  write_labels(a, t, order, s, best);
}

namespace {

// tokens [B, N, C] as the left operand
Operand tokens_operand(const TokenView& v, int tokens, int channels, int parts) {
  return operand_of({v.data, v.dtype, v.batch, v.token, v.channel}, v.token, v.channel, tokens, channels,
                    kTileRows, parts);
}

AssignPlan plan_assign(const Forward& a, int room) {
  AssignPlan p{};
  const Round& r = a.round[0];
  const int channels = a.channels, slabs = (channels + kSlab - 1) / kSlab;
  const bool fused = fuses_keys(a);
  p.float_parts = fused ? kFusedParts : kMaxParts;
  p.tiles = (r.tokens() + kTileRows - 1) / kTileRows;
  TokenView keys = a.keys;
  if (a.token_keys) keys = {a.token_keys, DType::f32, int64_t{r.tokens()} * channels, channels, 1};
  p.keys =
      tokens_operand(keys, r.tokens(), channels, fused ? kFusedParts : parts_of(keys.dtype, p.float_parts));
  const Matrix pooled{a.saved + a.at.round[0].pooled, DType::f32, a.at.size, channels, 1};
  p.pooled = operand_of(pooled, channels, 1, r.centres(), channels, kTileColumns, p.float_parts);
  const int left = p.keys.parts * slab_bytes(kTileRows), right = p.float_parts * slab_bytes(kTileColumns);
  if (!fused) {
    p.window = std::max(1, std::min(slabs, room / (left + right)));
    return p;
  }
  p.x = tokens_operand(a.keys, r.tokens(), channels, 1);
  const Matrix weight{const_cast<void*>(r.key_weight), a.dtype, 0, channels, 1};
  p.weight = operand_of(weight, channels, 1, channels, channels, kTileColumns, 1);
  p.keys.across = false;
  room -= slabs * slab_bytes(kTileRows);
  p.weight_window = std::max(1, std::min(slabs, room / (slabs * slab_bytes(kTileColumns))));
  p.window = std::max(1, std::min(slabs, (room - slabs * left) / right));
  return p;
}

// Dynamic shared memory of a block.
int assign_bytes(const Forward& a, const AssignPlan& p) {
  const int slabs = (a.channels + kSlab - 1) / kSlab;
  const int left = p.keys.parts * slab_bytes(kTileRows), right = p.pooled.parts * slab_bytes(kTileColumns);
  if (!fuses_keys(a)) return p.window * (left + right);
  const int weight = p.weight_window * slabs * slab_bytes(kTileColumns);
  return slabs * slab_bytes(kTileRows) + std::max(weight, slabs * left + p.window * right);
}

}  // namespace

cudaError_t run_assign(const Forward& a, cudaStream_t stream) {
  int limit = 0;
  if (const cudaError_t error = device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return error;
  const AssignPlan plan = plan_assign(a, limit - static_cast<int>(sizeof(AssignShared)));
  const auto kernel = fuses_keys(a) ? assign_kernel<true> : assign_kernel<false>;
  return FRD_LAUNCH_DEPENDENT(kernel, dim3(static_cast<unsigned>(a.batch * plan.tiles)), dim3(kBlockThreads),
                              assign_bytes(a, plan), stream, a, plan);
}

}  // namespace chain
}  // namespace frd
