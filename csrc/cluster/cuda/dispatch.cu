// Every token's own centre times its similarity, and the gradients.
#include "cluster/cuda/dispatch.h"
#include "cluster/cuda/rows.cuh"
#include "core/cuda_device.h"

namespace frd {

// Labels index memory, so that one beyond the centres must not be followed: its token becomes NaN.
FRD_DEVICE bool has_centre(const ClusterDispatchArgs& a, int32_t label) {
  return label >= 0 && label < a.count;
}

// A block for each tile of kTileRows tokens of an item.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    dispatch_kernel(const __grid_constant__ ClusterDispatchArgs a, int tiles) {
  using A = compute_t<T>;
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t item = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * kTileRows;
  const int m = a.tokens - first < kTileRows ? a.tokens - first : kTileRows;
  const int32_t* labels = a.labels + item * a.tokens + first;
  const A* similarity = static_cast<const A*>(a.similarity) + item * a.tokens + first;
  const Rows<T> centres = rows_of<T>(a.centres, item), out = rows_of<T>(a.out, item);
  const auto value = [&](int32_t label, A factor, T centre) {
    T result;
    store(result, label < 0 ? A(0) : label < a.count ? factor * load(centre) : A(NAN));
    return result;
  };
  if (is_wide(centres, a.channels) && is_wide(out, a.channels)) {
    for (int i = warp_of_block(); i < m; i += kBlockWarps) {
      const int32_t label = labels[i];
      const A factor = similarity[i];
      const T* row = &centres.at(has_centre(a, label) ? label : 0, 0);
      for (int c = lane_of_warp() * kWidth; c < a.channels; c += 32 * kWidth) {
        Pack16<T> pack = *reinterpret_cast<const Pack16<T>*>(row + c);
#pragma unroll
        for (T& v : pack.v) v = value(label, factor, v);
        *reinterpret_cast<Pack16<T>*>(&out.at(first + i, c)) = pack;
      }
    }
    return;
  }
  for_tile(m, a.channels, out.channel != 1, [&](int i, int c) {
    const int32_t label = labels[i];
    out.at(first + i, c) = value(label, similarity[i], centres.at(has_centre(a, label) ? label : 0, c));
  });
}

// A block for each chunk of an item's tokens: their similarities' gradients, and the chunk's sums of
// similarity * grad over each centre's tokens, [O, C], in shared memory where they fit.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    dispatch_sums_kernel(const __grid_constant__ ClusterDispatchArgs a, bool tile_shared, bool sums_shared) {
  using A = compute_t<T>;
  FRD_DYNAMIC_SHARED(uint4, shared_groups);  // aligned for vectors
  A* weight = reinterpret_cast<A*>(shared_groups);
  int32_t* label = reinterpret_cast<int32_t*>(weight + kTileRows);
  A* tile = weight + 2 * kTileRows;
  const int pitch = tile_pitch(a.channels);
  const int64_t item = blockIdx.x / a.chunks, size = static_cast<int64_t>(a.count) * a.channels;
  const Range range = range_of(a.tokens, a.chunks, static_cast<int>(blockIdx.x % a.chunks));
  const Rows<T> centres = rows_of<T>(a.centres, item), grad = rows_of<T>(a.grad, item);
  A* partial = static_cast<A*>(a.sums) + blockIdx.x * size;
  A* sums = sums_shared ? tile + (tile_shared ? kTileRows * pitch : 0) : partial;
  fill_block(sums, size, A(0));
  for (int first = range.begin; first < range.end; first += kTileRows) {
    const int m = range.end - first < kTileRows ? range.end - first : kTileRows;
    const int64_t token = item * a.tokens + first;
    __syncthreads();
    if (tile_shared) load_tile(grad, first, m, a.channels, tile, pitch);
    if (threadIdx.x < m) {
      const int32_t found = a.labels[token + threadIdx.x];
      label[threadIdx.x] = has_centre(a, found) ? found : -1;
      weight[threadIdx.x] = static_cast<const A*>(a.similarity)[token + threadIdx.x];
    }
    __syncthreads();
    for (int i = warp_of_block(); i < m; i += kBlockWarps) {
      A dot = 0;
      for (int c = lane_of_warp(); label[i] >= 0 && c < a.channels; c += 32)
        dot +=
            (tile_shared ? tile[i * pitch + c] : load(grad.at(first + i, c))) * load(centres.at(label[i], c));
      dot = warp_sum(dot);
      if (lane_of_warp() == 0) static_cast<A*>(a.similarity_grad)[token + i] = dot;
    }
    for (int c = threadIdx.x; c < a.channels; c += kBlockThreads)
      for (int i = 0; i < m; ++i)
        if (label[i] >= 0)
          sums[static_cast<int64_t>(label[i]) * a.channels + c] +=
              weight[i] * (tile_shared ? tile[i * pitch + c] : load(grad.at(first + i, c)));
  }
  if (!sums_shared) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < size; i += kBlockThreads) partial[i] = sums[i];
}

// A thread for each element of the centres' gradients: the chunks' sums in order.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    dispatch_centres_kernel(const __grid_constant__ ClusterDispatchArgs a) {
  using A = compute_t<T>;
  const int64_t size = static_cast<int64_t>(a.count) * a.channels;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x, item = at / size;
  if (item >= a.batch) return;
  const A* sums = static_cast<const A*>(a.sums) + item * a.chunks * size + at % size;
  A sum = 0;
  for (int k = 0; k < a.chunks; ++k) sum += sums[k * size];
  store(rows_of<T>(a.centres_grad, item).at(at % size / a.channels, static_cast<int>(at % a.channels)), sum);
}

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
