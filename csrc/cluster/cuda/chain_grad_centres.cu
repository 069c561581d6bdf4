// Gradients of the cosines of round 1 with the own centre, and of the pooled keys: released and `cluster`.
#include "cluster/cuda/chain_grad_rules.cuh"

namespace frd {
namespace chain {

constexpr int kCosineChannels = 256;  // of a tile of values
constexpr int kCentreTokens = 256;    // of a tile of keys
constexpr int kCentreChannels = 32;
constexpr int kCentreEach = 4;  // centres of a warp
constexpr int kCentres = kCentreEach * kBlockWarps;

FRD_HD inline int cosine_pitch(int channels) {
  return tile_pitch(channels < kCosineChannels ? channels : kCosineChannels);
}

// along [4] = dmean_l . (v - mean_l) of the warp's tokens of a tile, l = label [4]; masked ones are not read.
template <class T>
FRD_DEVICE void mean_products(const GradArgs& a, int64_t item, int first, int m, const int (&label)[4],
                              float* tile, float (&along)[4]) {
  const int pitch = cosine_pitch(a.channels), row0 = warp_of_block() * 4;
  const float* means = a.saved + item * a.layout.size + a.layout.mean;
  const float* grads = a.mean_grad + item * a.centres() * a.mean_grad_row;
#pragma unroll 1
  for (int begin = 0; begin < a.channels; begin += kCosineChannels) {
    const int width = a.channels - begin < kCosineChannels ? a.channels - begin : kCosineChannels;
    Rows<T> values = rows_of<T>(a.values, item);
    values.data += begin * values.channel;
    __syncthreads();
    load_tile(values, first, m, width, tile, pitch);
    __syncthreads();
#pragma unroll 2
    for (int c = lane_of_warp(); c < width; c += 32) {
      FRD_UNROLL
      for (int u = 0; u < 4; ++u) {
        if (label[u] < 0) continue;
        const float mean = means[int64_t{label[u]} * a.channels + begin + c];
        along[u] += grads[label[u] * a.mean_grad_row + begin + c] * (tile[(row0 + u) * pitch + c] - mean);
      }
    }
  }
  FRD_UNROLL
  for (float& v : along) v = warp_sum(v);
}

// A block for a run of an item's tokens.
//   ds += scale_l dmean_l . (v - mean_l); da = alpha s (1 - s) ds; dalpha = sum of s (1 - s) ds cos
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) grad_cosines_kernel(const __grid_constant__ GradArgs a) {
  FRD_DYNAMIC_SHARED(float4, shared);
  wait_for_previous();
  let_next_start();
  const int64_t item = blockIdx.x / a.chunks;
  const int begin = static_cast<int>(blockIdx.x % a.chunks) * a.chunk_tokens, left = a.tokens() - begin;
  const int end = begin + (left < a.chunk_tokens ? left : a.chunk_tokens), lane = lane_of_warp();
  const float* saved = a.saved + item * a.layout.size;
  double alpha = 0, beta = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kTileRows) {
    const int m = end - first < kTileRows ? end - first : kTileRows, row0 = warp_of_block() * 4;
    int label[4];
    float along[4] = {};
    FRD_UNROLL
    for (int u = 0; u < 4; ++u)
      label[u] = row0 + u < m ? a.labels[item * a.label_stride + first + row0 + u] : -1;
    if (a.weighted) mean_products<T>(a, item, first, m, label, reinterpret_cast<float*>(shared), along);
    FRD_UNROLL
    for (int u = 0; u < 4; ++u) {
      if (lane != u || row0 + u >= m) continue;
      const int n = first + row0 + u;
      float* to = a.cosine_grad + item * a.tokens() + n;
      float grad = 0;
      if (label[u] >= 0) {
        grad = a.similarity_grad[item * a.similarity_batch + n * a.similarity_token];
        if (a.weighted) {
          const float cosine = saved[a.layout.round[0].cosine + n];
          grad += saved[a.layout.round[0].scale + label[u]] * along[u];
          grad *= sigmoid_slope(a.beta[0] + a.alpha[0] * cosine);
          alpha += static_cast<double>(grad) * cosine, beta += grad;
          grad *= a.alpha[0];
        }
      }
      *to = grad;
    }
  }
  if (a.weighted) give_gates<kBlockWarps>(alpha, beta, a.gate_parts + int64_t{blockIdx.x} * 2);
}

// bin_share of centre o, by a warp
FRD_DEVICE void find_share(const GradArgs& a, int64_t item, int o) {
  const Round& r = a.round[0];
  const Bin bin = bin_of(r, o);
  const int width = bin.right - bin.left;
  float tokens = 0;
  for (int i = lane_of_warp(); i < bin.pixels(); i += 32) {
    const int n = (bin.top + i / width) * r.width + bin.left + i % width;
    if (a.labels[item * a.label_stride + n] >= 0) tokens += 1;
  }
  tokens = warp_sum(tokens);
  if (lane_of_warp() == 0) a.bin_share[item * r.centres() + o] = tokens > 0 ? 1.f / tokens : 0.f;
}

// Of a tile of tokens: label, da, da inv_norm.
struct LabelledTile {
  float* key;  // [kCentreTokens, kCentreChannels + 1]
  int32_t* label;
  float *pull, *radial;  // da inv_norm, da cos
};
constexpr int kLabelledFloats = kCentreTokens * (kCentreChannels + 1 + 3);

// sum [u] += pull times the key's channel of this lane, over the tile's tokens of label o + u, in order.
FRD_DEVICE void add_members(const LabelledTile& tile, int m, int o, float (&sum)[kCentreEach],
                            float (&radial)[kCentreEach]) {
#pragma unroll 1
  for (int first = 0; first < m; first += 32) {
    const int i = first + lane_of_warp(), label = i < m ? tile.label[i] : -1;
    unsigned found = __ballot_sync(0xffffffffu, label >= o && label < o + kCentreEach);
#pragma unroll 1
    while (found != 0) {
      const int member = first + lowest_bit(found), which = tile.label[member] - o;
      found &= found - 1;
      const float pulled = tile.pull[member] * tile.key[member * (kCentreChannels + 1) + lane_of_warp()];
      FRD_UNROLL
      for (int u = 0; u < kCentreEach; ++u)
        if (which == u) sum[u] += pulled, radial[u] += tile.radial[member];
    }
  }
}

// A block for kCentres centres of an item and kCentreChannels channels. K: of the keys
//   dKc_o = (sum of da u - c_o sum of da cos) inv_norm, both over the tokens of label o
template <class K>
__global__ void __launch_bounds__(kBlockThreads, 2) grad_centres_kernel(const __grid_constant__ GradArgs a) {
  FRD_DYNAMIC_SHARED(float4, shared);
  float* memory = reinterpret_cast<float*>(shared);
  const LabelledTile tile{memory, reinterpret_cast<int32_t*>(memory + kCentreTokens * (kCentreChannels + 1)),
                          memory + kCentreTokens * (kCentreChannels + 2),
                          memory + kCentreTokens * (kCentreChannels + 3)};
  const int slices = (a.channels + kCentreChannels - 1) / kCentreChannels;
  const int groups = (a.centres() + kCentres - 1) / kCentres;
  const int slice = static_cast<int>(blockIdx.x % slices),
            group = static_cast<int>(blockIdx.x / slices % groups);
  const int64_t item = blockIdx.x / slices / groups;
  const int begin = slice * kCentreChannels, c = begin + lane_of_warp();
  const int width = a.channels - begin < kCentreChannels ? a.channels - begin : kCentreChannels;
  const int first_centre = group * kCentres + warp_of_block() * kCentreEach;
  const float* saved = a.saved + item * a.layout.size;
  const SavedRound& at = a.layout.round[0];
  Rows<K> keys = rows_of<K>(a.keys, item);
  keys.data += begin * keys.channel;
  float sum[kCentreEach] = {}, radial[kCentreEach] = {};
#pragma unroll 1
  for (int first = 0; first < a.tokens(); first += kCentreTokens) {
    const int m = a.tokens() - first < kCentreTokens ? a.tokens() - first : kCentreTokens;
    const int n = first + static_cast<int>(threadIdx.x);
    __syncthreads();
    load_tile(keys, first, m, width, tile.key, kCentreChannels + 1);
    if (first == 0) wait_for_previous(), let_next_start();  // the keys are older
    if (static_cast<int>(threadIdx.x) < m) {
      const float grad = a.cosine_grad[item * a.tokens() + n];
      tile.label[threadIdx.x] = a.labels[item * a.label_stride + n];
      tile.pull[threadIdx.x] = grad * saved[at.inv_norm + n];
      tile.radial[threadIdx.x] = grad * saved[at.cosine + n];
    }
    __syncthreads();
    add_members(tile, m, first_centre, sum, radial);
  }
  FRD_UNROLL
  for (int u = 0; u < kCentreEach; ++u) {
    const int o = first_centre + u;
    if (o >= a.centres()) break;
    if (slice == 0) find_share(a, item, o);
    if (c >= a.channels) continue;
    const float inverse = saved[at.pooled_inv_norm + o];
    const float own = saved[at.pooled + int64_t{o} * a.channels + c] * inverse;
    a.pooled_grad[(item * a.centres() + o) * a.channels + c] = (sum[u] - own * radial[u]) * if_live(inverse);
  }
}
static_assert(kCentreTokens == kBlockThreads, "a thread for each token of a tile");

namespace {

template <class F>
cudaError_t with_rows(DType dtype, const F& f) {
  return dtype == DType::f16 ? f(f16{}) : dtype == DType::bf16 ? f(bf16{}) : f(0.f);
}

}  // namespace

cudaError_t grad_cosines(const GradArgs& a, cudaStream_t stream) {
  GradArgs args = a;
  if (a.similarity_grad == nullptr)
    args.similarity_grad = a.cosine_grad, args.similarity_batch = a.tokens(), args.similarity_token = 1;
  const int bytes = a.weighted ? kTileRows * cosine_pitch(a.channels) * 4 : 0;
  return with_rows(a.values.dtype, [&](auto row) {
    return FRD_LAUNCH_DEPENDENT((grad_cosines_kernel<decltype(row)>), dim3(a.batch * a.chunks),
                                dim3(kBlockThreads), bytes, stream, args);
  });
}

cudaError_t grad_centres(const GradArgs& a, cudaStream_t stream) {
  const int slices = (a.channels + kCentreChannels - 1) / kCentreChannels;
  const int groups = (a.centres() + kCentres - 1) / kCentres;
  return with_rows(a.keys.dtype, [&](auto row) {
    return FRD_LAUNCH_DEPENDENT((grad_centres_kernel<decltype(row)>), dim3(a.batch * slices * groups),
                                dim3(kBlockThreads), kLabelledFloats * 4, stream, a);
  });
}

}  // namespace chain
}  // namespace frd
