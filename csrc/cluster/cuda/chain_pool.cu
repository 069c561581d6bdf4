// Bin means of tokens, with products on the blocks beside.
#include <algorithm>
#include <cstdint>

#include "cluster/cuda/chain_product.cuh"
#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

constexpr int kPoolChannels = 4;  // of a thread

// The bin means of tokens [B, N, C] go to `to` [B, O, C] with items to_item apart, and to `copy` unless null.
struct Pool {
  TokenView from;
  bool wide, inner;  // aligned groups of kPoolChannels; neighbours in memory are tokens
  float *to, *copy;
  int64_t to_item, copy_item;
};
struct PoolArgs {
  Round round;
  int channels;
  const bool* mask;  // [B, N] with these strides, or null
  int64_t mask_batch, mask_token;
  int slices;          // of a bin's tokens, a power of 2: as many threads for kPoolChannels of a mean
  int blocks_of_item;  // of one pool
  int count;
  Pool pool[2];
};

template <class T>
struct alignas(kPoolChannels * sizeof(T)) ChannelPack {
  T v[kPoolChannels];
};
// left: channels of the row from here on
template <class T>
FRD_DEVICE ChannelPack<T> read_channels(const Pool& p, const T* from, int left) {
  if (p.wide) return *reinterpret_cast<const ChannelPack<T>*>(from);
  ChannelPack<T> pack{};
  FRD_UNROLL
  for (int e = 0; e < kPoolChannels; ++e)
    if (e < left) pack.v[e] = from[e * p.from.channel];
  return pack;
}

// What a thread adds up: a slice of a bin. Returns the number of tokens.
template <class T>
FRD_DEVICE int sum_slice(const PoolArgs& a, const Pool& p, int64_t item, const Bin& bin, int slice,
                         int channel, float (&sum)[kPoolChannels]) {
  constexpr int kFlight = 4;
  const T* data = static_cast<const T*>(p.from.data) + item * p.from.batch + channel * p.from.channel;
  const unsigned width = bin.right - bin.left, pixels = bin.pixels();
  int count = 0;
#pragma unroll 1
  for (unsigned first = slice; first < pixels; first += kFlight * a.slices) {
    ChannelPack<T> pack[kFlight] = {};
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) {
      const unsigned i = first + u * a.slices, row = i / width;
      const int64_t token =
          static_cast<int64_t>(bin.top + row) * a.round.width + bin.left + (i - row * width);
      if (i >= pixels || (a.mask && !in_global(a.mask)[item * a.mask_batch + token * a.mask_token])) continue;
      pack[u] = read_channels(p, data + token * p.from.token, a.channels - channel);
      ++count;
    }
    FRD_UNROLL
    for (int u = 0; u < kFlight; ++u) FRD_UNROLL
    for (int e = 0; e < kPoolChannels; ++e) sum[e] += load(pack[u].v[e]);
  }
  return count;
}

// Adds up the slices in their order; true for the threads of the first slice, which have the result.
FRD_DEVICE bool add_slices(const PoolArgs& a, int slice, float (&sum)[kPoolChannels], int& count,
                           float4* shared) {
  if (a.slices == 1) return true;
  int* counts = reinterpret_cast<int*>(shared + kBlockThreads);
  shared[threadIdx.x] = {sum[0], sum[1], sum[2], sum[3]};
  counts[threadIdx.x] = count;
  __syncthreads();
  if (slice > 0) return false;
  for (int s = 1; s < a.slices; ++s) {
    const float4 v = shared[threadIdx.x + s];
    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    count += counts[threadIdx.x + s];
  }
  return true;
}

// mean [O, C] = sum over the tokens of a bin / their number, or 0 for none
FRD_DEVICE void pool_bins(const PoolArgs& a, const Pool& p, int64_t item, int block, float4* shared) {
  const int groups = (a.channels + kPoolChannels - 1) / kPoolChannels, centres = a.round.centres();
  const int slice = threadIdx.x % a.slices, outputs = kBlockThreads / a.slices;
  const unsigned i = static_cast<unsigned>(block) * outputs + threadIdx.x / a.slices;
  const unsigned o = p.inner ? i % centres : i / groups, group = p.inner ? i / centres : i % groups;
  const int channel = group * kPoolChannels;
  const bool inside = o < static_cast<unsigned>(centres) && group < static_cast<unsigned>(groups);
  float sum[kPoolChannels] = {};
  int count = 0;
  const auto add = [&](auto type) {
    count = sum_slice<decltype(type)>(a, p, item, bin_of(a.round, o), slice, channel, sum);
  };
  if (inside && p.from.dtype == DType::f32)
    add(f32{});
  else if (inside && p.from.dtype == DType::f16)
    add(f16{});
  else if (inside)
    add(bf16{});
  if (!add_slices(a, slice, sum, count, shared) || !inside) return;
  const int64_t at = static_cast<int64_t>(o) * a.channels + channel;
  FRD_UNROLL
  for (int e = 0; e < kPoolChannels; ++e) {
    if (channel + e >= a.channels) break;
    const float mean = count > 0 ? sum[e] / static_cast<float>(count) : 0.f;
    p.to[item * p.to_item + at + e] = mean;
    if (p.copy) p.copy[item * p.copy_item + at + e] = mean;
  }
}

// tiles of the tasks, then the pools
__global__ void __launch_bounds__(kBlockThreads, 2)
    pool_kernel(const __grid_constant__ PoolArgs a, const __grid_constant__ Tasks tasks, int64_t batch) {
  FRD_DYNAMIC_SHARED(uint4, shared);
  if (static_cast<int>(blockIdx.x) < tasks.blocks) {
    run_tile(tasks, blockIdx.x, reinterpret_cast<char*>(shared));
    return;
  }
  wait_for_previous();
  let_next_start();
  const unsigned block = blockIdx.x - tasks.blocks, of_pool = a.blocks_of_item * static_cast<unsigned>(batch);
  const Pool& p = a.pool[block / of_pool];
  const int64_t item = block % of_pool / a.blocks_of_item;
  const int of_item = static_cast<int>(block % a.blocks_of_item);
  pool_bins(a, p, item, of_item, reinterpret_cast<float4*>(shared));
}

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
