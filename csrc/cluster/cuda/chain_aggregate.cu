#include "cluster/cuda/chain_aggregate.cuh"

#include <algorithm>
#include <cstdint>

namespace frd {
namespace chain {
namespace {

template <class T>
AggregatePlan plan_aggregate(const Forward& a) {
  constexpr int64_t kGroupSize = 16 / sizeof(T), kWordSize = 4 / sizeof(T);
  const TokenView& v = a.values;
  const auto aligned = [&](int64_t elements, int64_t other) {
    return other % elements == 0 && v.batch % elements == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % (elements * sizeof(T)) == 0;
  };
  AggregatePlan p{};
  p.channel_slices = (a.channels + kSliceChannels - 1) / kSliceChannels;
  p.centre_slices = (a.round[0].centres() + kSliceCentres - 1) / kSliceCentres;
  p.chunk = std::min(kChunkTokens<T>, (a.round[0].tokens() + 3) / 4 * 4);
  p.pitch = p.chunk + static_cast<int>(kWordSize);
  p.inner = v.token == 1 && v.channel != 1;
  p.copied = p.inner ? aligned(kWordSize, v.channel)
                     : v.channel == 1 && a.channels % kGroupSize == 0 && aligned(kGroupSize, v.token);
  return p;
}

template <class T>
cudaError_t run(const Forward& a, cudaStream_t stream) {
  const AggregatePlan p = plan_aggregate<T>(a);
  const int bytes = kSliceChannels * p.pitch * static_cast<int>(sizeof(T)) + p.chunk * (a.weighted ? 6 : 2);
  const auto kernel = a.weighted ? aggregate_kernel<T, true> : aggregate_kernel<T, false>;
  return FRD_LAUNCH_DEPENDENT(kernel,
                              dim3(static_cast<unsigned>(a.batch * p.channel_slices * p.centre_slices)),
                              dim3(kBlockThreads), bytes, stream, a, p);
}

}  // namespace

cudaError_t run_aggregate(const Forward& a, cudaStream_t stream) {
  return a.dtype == DType::f32   ? run<f32>(a, stream)
         : a.dtype == DType::f16 ? run<f16>(a, stream)
                                 : run<bf16>(a, stream);
}

}  // namespace chain
}  // namespace frd
