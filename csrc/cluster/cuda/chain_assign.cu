#include "cluster/cuda/chain_assign.cuh"

#include <algorithm>

#include "cluster/cuda/chain_operand.h"
#include "cluster/cuda/chain_plan.h"

namespace frd {
namespace chain {
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
