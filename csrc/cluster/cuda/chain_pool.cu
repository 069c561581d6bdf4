#include "cluster/cuda/chain_pool.cuh"

#include <algorithm>
#include <cstdint>

namespace frd {
namespace chain {
namespace {

Pool pool_of(const TokenView& from, int channels, float* to, int64_t to_item) {
  Pool p{};
  p.from = from;
  const int64_t size = from.dtype == DType::f32 ? 4 : 2;
  p.wide = from.channel == 1 && channels % kPoolChannels == 0 && from.token % kPoolChannels == 0 &&
           from.batch % kPoolChannels == 0 &&
           reinterpret_cast<uintptr_t>(from.data) % (kPoolChannels * size) == 0;
  p.inner = from.token == 1 && from.channel != 1;
  p.to = to, p.to_item = to_item;
  return p;
}

bool same_tokens(const TokenView& a, const TokenView& b) {
  return a.data == b.data && a.batch == b.batch && a.token == b.token && a.channel == b.channel;
}

// Threads for a bin's tokens: up to 32, of about eight tokens each.
int slices_of(const Round& r) {
  const int pixels = (r.height + r.rows - 1) / r.rows * ((r.width + r.columns - 1) / r.columns);
  int slices = 1;
  while (slices < 32 && 8 * slices < pixels) slices *= 2;
  return slices;
}

PoolArgs plan_pools(const Forward& a) {
  PoolArgs p{};
  p.round = a.round[0];
  p.channels = a.channels;
  p.mask = a.mask, p.mask_batch = a.mask_batch, p.mask_token = a.mask_token;
  p.slices = slices_of(p.round);
  const int64_t outputs = int64_t{p.round.centres()} * ((a.channels + kPoolChannels - 1) / kPoolChannels);
  p.blocks_of_item = static_cast<int>((outputs * p.slices + kBlockThreads - 1) / kBlockThreads);
  p.pool[p.count++] = pool_of(a.values, a.channels, a.pooled_values, int64_t{p.round.centres()} * a.channels);
  if (a.projected()) return p;
  float* const keys = a.saved + a.at.round[0].pooled;
  if (same_tokens(a.keys, a.values))
    p.pool[0].copy = keys, p.pool[0].copy_item = a.at.size;
  else
    p.pool[p.count++] = pool_of(a.keys, a.channels, keys, a.at.size);
  return p;
}

}  // namespace

cudaError_t run_pool(const Forward& args, const Products& beside, cudaStream_t stream) {
  Products products = beside;
  for (Product& p : products.product) p.right_early = false;  // a kernel before the chain may still write it
  Tasks tasks;
  if (const cudaError_t error = plan_tasks(products, &tasks)) return error;
  const PoolArgs pools = plan_pools(args);
  const int64_t blocks = tasks.blocks + args.batch * pools.count * pools.blocks_of_item;
  const int slices = pools.slices > 1 ? kBlockThreads * static_cast<int>(sizeof(float4) + sizeof(int)) : 0;
  return FRD_LAUNCH_DEPENDENT(pool_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads),
                              std::max(tasks.bytes, slices), stream, pools, tasks, args.batch);
}

}  // namespace chain
}  // namespace frd
