#include "cluster/cuda/dispatch.cuh"
#include "core/cuda_device.h"

namespace frd {
namespace {

unsigned blocks_of(int64_t n, int64_t by) { return static_cast<unsigned>((n + by - 1) / by); }

template <class T>
cudaError_t backward(const ClusterDispatchArgs& a, int shared_limit, cudaStream_t stream) {
  using A = compute_t<T>;
  const int64_t room = shared_limit / static_cast<int64_t>(sizeof(A)) - 2 * kTileRows;
  const int64_t tile = int64_t{kTileRows} * tile_pitch(a.channels), sums = int64_t{a.count} * a.channels;
  const bool tile_shared = tile <= room, sums_shared = sums <= (tile_shared ? room - tile : room);
  const int64_t elements = 2 * kTileRows + (tile_shared ? tile : 0) + (sums_shared ? sums : 0);
  const int bytes = static_cast<int>(elements * sizeof(A));
  const auto kernel = dispatch_sums_kernel<T>;
  if (const cudaError_t error = allow_shared_memory(kernel, bytes)) return error;
  FRD_LAUNCH(kernel, dim3(blocks_of(a.batch * a.chunks, 1)), dim3(kBlockThreads), bytes, stream, a,
             tile_shared, sums_shared);
  if (const cudaError_t error = cudaGetLastError()) return error;
  FRD_LAUNCH((dispatch_centres_kernel<T>), dim3(blocks_of(a.batch * sums, kBlockThreads)),
             dim3(kBlockThreads), 0, stream, a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t cluster_dispatch(const ClusterDispatchArgs& a, cudaStream_t stream) {
  return with_dtype(a.centres.dtype, [&](auto type) {
    const int tiles = (a.tokens + kTileRows - 1) / kTileRows;
    FRD_LAUNCH((dispatch_kernel<decltype(type)>), dim3(blocks_of(a.batch * tiles, 1)), dim3(kBlockThreads), 0,
               stream, a, tiles);
    return cudaGetLastError();
  });
}

cudaError_t cluster_dispatch_backward(const ClusterDispatchArgs& a, int shared_limit, cudaStream_t stream) {
  return with_dtype(a.centres.dtype,
                    [&](auto type) { return backward<decltype(type)>(a, shared_limit, stream); });
}

}  // namespace frd
