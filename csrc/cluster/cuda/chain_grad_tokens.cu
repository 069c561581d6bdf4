// From the gradient of the output to those of the last centres and of the cosines: a sweep over the tokens.
#include "cluster/cuda/chain_grad_rules.cuh"

namespace frd {
namespace chain {

constexpr int kSlab = kBlockThreads;                // channels of a tile in shared memory
constexpr int kColumns = 4;                         // of the J last centres at a time
constexpr int kWarpRows = kTileRows / kBlockWarps;  // of a tile, neighbours

// The block's shared memory: rows of dF and of the keys, and what each row weighs in the sums.
struct TokenTile {
  int pitch;
  float *grad, *key;           // [kTileRows, pitch]; key: paper alone
  float *gate, *score, *pull;  // [kTileRows, kColumns] g, dS, dS inv_norm; released: gate, score [kTileRows]
  int32_t *last, *label;       // [kTileRows] released: the end of the chain, and its beginning
  __device__ float4 gates(int row) const { return reinterpret_cast<const float4*>(gate)[row]; }
  __device__ float4 pulls(int row) const { return reinterpret_cast<const float4*>(pull)[row]; }
};
FRD_HD inline int token_tile_floats(int channels, bool dense) {
  const int pitch = tile_pitch(channels < kSlab ? channels : kSlab);
  return kTileRows * ((dense ? 2 : 1) * pitch + 3 * kColumns);
}
FRD_DEVICE TokenTile token_tile(float* memory, int channels, bool dense) {
  TokenTile t;
  t.pitch = tile_pitch(channels < kSlab ? channels : kSlab);
  t.grad = memory, t.key = t.grad + (dense ? kTileRows * t.pitch : 0);
  t.gate = t.key + kTileRows * t.pitch, t.score = t.gate + kTileRows * kColumns;
  t.pull = t.score + kTileRows * kColumns;
  t.last = reinterpret_cast<int32_t*>(t.pull), t.label = t.last + kTileRows;
  return t;
}

// Where the block works: m tokens from `first` of an item, whose run of tokens is number `run` of the batch.
struct Sweep {
  const GradArgs& a;
  int64_t item, run;
  int first, m;
  bool begins;  // the run: its sums are written, not added to
  __device__ const float* saved() const { return a.saved + item * a.layout.size; }
  __device__ const float* last_centres() const { return saved() + a.layout.round[a.count - 1].rows; }
  // to [count] of this stride = the run's sums with those of this tile
  template <int kCount>
  __device__ void give(float* to, int64_t stride, int count, const float (&sum)[kCount]) const {
    float before[kCount] = {};  // loaded together
    FRD_UNROLL
    for (int j = 0; j < kCount; ++j)
      if (!begins && j < count) before[j] = to[j * stride];
    FRD_UNROLL
    for (int j = 0; j < kCount; ++j)
      if (j < count) to[j * stride] = before[j] + sum[j];
  }
};

// v[k] summed over the lanes of a warp, in lane k.
template <int kStep = 16>
FRD_DEVICE float sum_to_lanes(float (&v)[32]) {
  const bool upper = lane_of_warp() & kStep;
  FRD_UNROLL
  for (int i = 0; i < kStep; ++i) {
    const float give = upper ? v[i] : v[i + kStep];
    v[i] = (upper ? v[i + kStep] : v[i]) + __shfl_xor_sync(0xffffffffu, give, kStep);
  }
  if constexpr (kStep > 1) sum_to_lanes<kStep / 2>(v);
  return v[0];
}

// Calls f(first channel, width) for each slab of channels, twice, its rows of dF and, if not null, of the
// keys in the tile; `between` after the first time. One slab stays.
template <class T, class K, class F, class G>
FRD_DEVICE void for_slabs_twice(const Sweep& s, const TokenTile& tile, bool loaded, const Rows<K>* keys,
                                const F& f, const G& between) {
  const int channels = s.a.channels, slabs = (channels + kSlab - 1) / kSlab;
#pragma unroll 1
  for (int i = 0; i < 2 * slabs; ++i) {
    const bool again = i >= slabs;
    const int begin = (again ? i - slabs : i) * kSlab;
    const int width = channels - begin < kSlab ? channels - begin : kSlab;
    if (i == slabs) between();
    if (slabs > 1 || !(loaded || again)) {
      __syncthreads();
      Rows<T> grad = rows_of<T>(s.a.grad, s.item);
      grad.data += begin * grad.channel;
      load_tile(grad, s.first, s.m, width, tile.grad, tile.pitch);
      if (i == 0 && s.begins) wait_for_previous(), let_next_start();  // dF is older
      if (keys != nullptr) {
        const Rows<K> key{keys->data + begin * keys->channel, keys->row, keys->channel};
        load_tile(key, s.first, s.m, width, tile.key, tile.pitch);
      }
      __syncthreads();
    }
    f(again, begin, width);
  }
}

// v [row of the warp][column] += dF R_T^T over a slab, of kColumns last centres from j0.
FRD_DEVICE void add_dots(const Sweep& s, const TokenTile& tile, int j0, int begin, int width,
                         float (&v)[32]) {
  const int row0 = warp_of_block() * kWarpRows, channels = s.a.channels, columns = s.a.last() - j0;
  const float* centre = s.last_centres() + int64_t{j0} * channels + begin;
#pragma unroll 4
  for (int c = lane_of_warp(); c < width; c += 32) {
    FRD_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      if (j >= columns) break;
      const float value = centre[int64_t{j} * channels + c];
      FRD_UNROLL
      for (int u = 0; u < kWarpRows; ++u)
        if (row0 + u < s.m) v[u * kColumns + j] += tile.grad[(row0 + u) * tile.pitch + c] * value;
    }
  }
}

// v [16 + row of the warp][column] = the lane's share of S, of kColumns last centres from j0.
FRD_DEVICE void add_products_of_cosines(const Sweep& s, int j0, float (&v)[32]) {
  const GradArgs& a = s.a;
  const int row0 = warp_of_block() * kWarpRows, last = a.last(), centres = a.centres(), columns = last - j0;
  const float* matrix = s.saved() + a.layout.round[0].matrix + int64_t{s.first + row0} * centres;
  const float* link = s.saved() + a.layout.links + j0;
#pragma unroll 2
  for (int o = lane_of_warp(); o < centres; o += 32) {
    FRD_UNROLL
    for (int u = 0; u < kWarpRows; ++u) {
      if (row0 + u >= s.m) break;
      const float cosine = matrix[int64_t{u} * centres + o];
      FRD_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        if (j >= columns) break;
        if (a.count > 1)
          v[16 + u * kColumns + j] += cosine * link[int64_t{o} * last + j];
        else if (o == j0 + j)
          v[16 + u * kColumns + j] = cosine;
      }
    }
  }
}

struct GateSums {
  double alpha, beta;
};

// Gate, dS and dS inv_norm of the tile's tokens from the lanes' shares v. Lane 4 u + j < 16 has those of row
// u of its warp; adds S dS to `radial`.
FRD_DEVICE void finish_scores(const Sweep& s, const TokenTile& tile, int j0, float (&v)[32], float& radial,
                              GateSums& sums) {
  const GradArgs& a = s.a;
  const int lane = lane_of_warp(), row = warp_of_block() * kWarpRows + lane % 16 / kColumns,
            j = lane % kColumns;
  const float along = sum_to_lanes(v), score = __shfl_down_sync(0xffffffffu, along, 16);
  const bool takes_part = lane < 16 && row < s.m && j0 + j < a.last();
  const float raised = a.alpha[0] * score + a.beta[0], gate = sigmoid(raised);
  const float argument = along * sigmoid_slope(raised), grad = a.alpha[0] * argument;
  float product = takes_part ? score * grad : 0.f;
  product += __shfl_xor_sync(0xffffffffu, product, 1);
  product += __shfl_xor_sync(0xffffffffu, product, 2);
  radial += product;
  if (lane >= 16) return;
  const float inverse = takes_part ? s.saved()[a.layout.round[0].inv_norm + s.first + row] : 0.f;
  tile.gate[row * kColumns + j] = takes_part ? gate : 0.f;
  tile.score[row * kColumns + j] = takes_part ? grad : 0.f;
  tile.pull[row * kColumns + j] = takes_part ? grad * inverse : 0.f;
  if (!takes_part) return;
  sums.alpha += static_cast<double>(argument) * score, sums.beta += argument;
  a.score_grad[(s.item * a.tokens() + s.first + row) * a.last() + j0 + j] = grad;
}

// The run's dR_T = g^T dF and U = dS^T u_1 of kColumns last centres from j0, over a slab.
FRD_DEVICE void add_weighted_rows(const Sweep& s, const TokenTile& tile, int j0, int begin, int width) {
  const GradArgs& a = s.a;
  const int c = threadIdx.x;
  if (c >= width) return;
  float centre[kColumns] = {}, unit[kColumns] = {};
#pragma unroll 4
  for (int i = 0; i < s.m; ++i) {
    const float grad = tile.grad[i * tile.pitch + c], key = tile.key[i * tile.pitch + c];
    const float4 gate = tile.gates(i), pull = tile.pulls(i);
    centre[0] += gate.x * grad, centre[1] += gate.y * grad, centre[2] += gate.z * grad,
        centre[3] += gate.w * grad;
    unit[0] += pull.x * key, unit[1] += pull.y * key, unit[2] += pull.z * key, unit[3] += pull.w * key;
  }
  const int64_t at = (s.run * a.last() + j0) * a.channels + begin + c;
  s.give(a.last_parts + at, a.channels, a.last() - j0, centre);
  s.give(a.unit_parts + at, a.channels, a.last() - j0, unit);
}

// The run's dP = M_1^T dS of kColumns last centres from j0.
FRD_DEVICE void add_products(const Sweep& s, const TokenTile& tile, int j0) {
  const GradArgs& a = s.a;
  const int centres = a.centres();
  const float* matrix = s.saved() + a.layout.round[0].matrix + int64_t{s.first} * centres;
  for (int o = threadIdx.x; o < centres; o += kBlockThreads) {
    float sum[kColumns] = {};
#pragma unroll 8
    for (int i = 0; i < s.m; ++i) {
      const float cosine = matrix[int64_t{i} * centres + o];
      FRD_UNROLL
      for (int j = 0; j < kColumns; ++j) sum[j] += cosine * tile.score[i * kColumns + j];
    }
    s.give(a.product_parts + (s.run * centres + o) * a.last() + j0, 1, a.last() - j0, sum);
  }
}

// Calls f(Sweep) for the tiles of the block's run of tokens.
template <class F>
FRD_DEVICE void for_run(const GradArgs& a, const F& f) {
  const int64_t item = blockIdx.x / a.chunks;
  const int begin = static_cast<int>(blockIdx.x % a.chunks) * a.chunk_tokens, left = a.tokens() - begin;
  const int end = begin + (left < a.chunk_tokens ? left : a.chunk_tokens);
#pragma unroll 1
  for (int first = begin; first < end; first += kTileRows)
    f(Sweep{a, item, blockIdx.x, first, end - first < kTileRows ? end - first : kTileRows, first == begin});
}

// A block for a run of an item's tokens. T: of dF; K: of the keys
//   S = M_1 P; g = sigmoid(alpha S + beta); dS = alpha (dF R_T^T) g (1 - g); dR_T = g^T dF; U = dS^T u_1;
//   dP = M_1^T dS; dalpha = sum of S dS / alpha
template <class T, class K>
__global__ void __launch_bounds__(kBlockThreads, 2) grad_scores_kernel(const __grid_constant__ GradArgs a) {
  FRD_DYNAMIC_SHARED(float4, shared);
  // Without the keys' product this is the operator's first launch: the kernel before it may have written dF.
  if (a.round[0].key_weight == nullptr) wait_for_previous();
  const TokenTile tile = token_tile(reinterpret_cast<float*>(shared), a.channels, true);
  GateSums sums{0, 0};
  for_run(a, [&](const Sweep& s) {
    const Rows<K> keys = rows_of<K>(a.keys, s.item);
    float radial = 0;
#pragma unroll 1
    for (int j0 = 0; j0 < a.last(); j0 += kColumns) {
      float v[32] = {};
      for_slabs_twice<T>(
          s, tile, j0 > 0, &keys,
          [&](bool again, int begin, int width) {
            if (again)
              add_weighted_rows(s, tile, j0, begin, width);
            else
              add_dots(s, tile, j0, begin, width, v);
          },
          [&] {
            add_products_of_cosines(s, j0, v);
            finish_scores(s, tile, j0, v, radial, sums);
            __syncthreads();
          });
      add_products(s, tile, j0);
      __syncthreads();
    }
    const int row = warp_of_block() * kWarpRows + lane_of_warp() / kColumns;
    if (lane_of_warp() % kColumns == 0 && lane_of_warp() < 16 && row < s.m)
      a.radial[s.item * a.tokens() + s.first + row] = radial;
  });
  give_gates<kBlockWarps>(sums.alpha, sums.beta, a.gate_parts + int64_t{blockIdx.x} * 2);
}

// ---- released ----

// A lane's token of a warp's four: its labels along the rounds.
struct TokenChain {
  int row, label, last;
  float own, later;  // s_1, and the product of the later weights
};
FRD_DEVICE TokenChain token_chain(const Sweep& s) {
  const GradArgs& a = s.a;
  TokenChain t{warp_of_block() * kWarpRows + lane_of_warp() % kWarpRows, -1, 0, 0, 0};
  if (t.row >= s.m) return t;
  t.label = a.labels[s.item * a.label_stride + s.first + t.row];
  const LabelChain later = follow(a, s.item, 1, t.label);
  t.own = sigmoid(a.beta[0] + a.alpha[0] * s.saved()[a.layout.round[0].cosine + s.first + t.row]);
  t.later = later.weight, t.last = later.last;
  return t;
}

// along [row of the warp] += the lane's share of dw = dF . R_T(last) over a slab.
FRD_DEVICE void add_chain_dots(const Sweep& s, const TokenTile& tile, const TokenChain& t, int begin,
                               int width, float (&along)[kWarpRows]) {
  const int row0 = warp_of_block() * kWarpRows;
  int last[kWarpRows];
  FRD_UNROLL
  for (int u = 0; u < kWarpRows; ++u) last[u] = __shfl_sync(0xffffffffu, t.last, u);
#pragma unroll 4
  for (int c = lane_of_warp(); c < width; c += 32) {
    FRD_UNROLL
    for (int u = 0; u < kWarpRows; ++u)
      if (row0 + u < s.m)
        along[u] += tile.grad[(row0 + u) * tile.pitch + c] *
                    s.last_centres()[int64_t{last[u]} * s.a.channels + begin + c];
  }
}

// gate: the weight of the tile's tokens in the output; score: dw s_1; cosine_grad.
FRD_DEVICE void finish_chains(const Sweep& s, const TokenTile& tile, const TokenChain& t,
                              float (&along)[kWarpRows]) {
  FRD_UNROLL
  for (float& v : along) v = warp_sum(v);
  const int lane = lane_of_warp();
  if (lane >= kWarpRows || t.row >= s.m) return;
  float dot = along[0];
  FRD_UNROLL
  for (int u = 1; u < kWarpRows; ++u)
    if (lane == u) dot = along[u];
  tile.label[t.row] = t.label, tile.last[t.row] = t.last;
  tile.gate[t.row] = t.own * t.later, tile.score[t.row] = dot * t.own;
  s.a.cosine_grad[s.item * s.a.tokens() + s.first + t.row] = dot * t.later;
}

// The run's sums of gate dF over the tokens of each last centre, over a slab.
FRD_DEVICE void add_chain_rows(const Sweep& s, const TokenTile& tile, int begin, int width) {
  const GradArgs& a = s.a;
  const int c = threadIdx.x;
  if (c >= width) return;
#pragma unroll 1
  for (int j0 = 0; j0 < a.last(); j0 += kColumns) {
    float centre[kColumns] = {};
#pragma unroll 4
    for (int i = 0; i < s.m; ++i) {
      const float grad = tile.gate[i] * tile.grad[i * tile.pitch + c];
      FRD_UNROLL
      for (int j = 0; j < kColumns; ++j)
        if (tile.last[i] == j0 + j) centre[j] += grad;
    }
    s.give(a.last_parts + (s.run * a.last() + j0) * a.channels + begin + c, a.channels, a.last() - j0,
           centre);
  }
}

// The run's sums of score over the tokens of each label.
FRD_DEVICE void add_flows(const Sweep& s, const TokenTile& tile) {
  for (int o = threadIdx.x; o < s.a.centres(); o += kBlockThreads) {
    float sum[1] = {};
    for (int i = 0; i < s.m; ++i)
      if (tile.label[i] == o) sum[0] += tile.score[i];
    s.give(s.a.chain_parts + s.run * s.a.centres() + o, 1, 1, sum);
  }
}

// A block for a run of an item's tokens.
//   out = w R_T(last), w = s_1 s_2(l_1) ...: dR_T(j) = sum of w dF over last = j; dw = dF . R_T(last)
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) grad_chains_kernel(const __grid_constant__ GradArgs a) {
  FRD_DYNAMIC_SHARED(float4, shared);
  // Without the keys' product this is the operator's first launch: the kernel before it may have written dF.
  if (a.round[0].key_weight == nullptr) wait_for_previous();
  const TokenTile tile = token_tile(reinterpret_cast<float*>(shared), a.channels, false);
  for_run(a, [&](const Sweep& s) {
    const TokenChain chain = token_chain(s);
    float along[kWarpRows] = {};
    for_slabs_twice<T>(
        s, tile, false, static_cast<const Rows<T>*>(nullptr),
        [&](bool again, int begin, int width) {
          if (again)
            add_chain_rows(s, tile, begin, width);
          else
            add_chain_dots(s, tile, chain, begin, width, along);
        },
        [&] {
          finish_chains(s, tile, chain, along);
          __syncthreads();
        });
    add_flows(s, tile);
    __syncthreads();
  });
}

namespace {

template <class T, class K>
cudaError_t launch_scores(const GradArgs& a, cudaStream_t stream) {
  return FRD_LAUNCH_DEPENDENT((grad_scores_kernel<T, K>), dim3(a.batch * a.chunks), dim3(kBlockThreads),
                              token_tile_floats(a.channels, true) * 4, stream, a);
}

template <class T>
cudaError_t launch(const GradArgs& a, cudaStream_t stream) {
  if (!a.dense)
    return FRD_LAUNCH_DEPENDENT((grad_chains_kernel<T>), dim3(a.batch * a.chunks), dim3(kBlockThreads),
                                token_tile_floats(a.channels, false) * 4, stream, a);
  return a.keys.dtype == DType::f32 ? launch_scores<T, float>(a, stream) : launch_scores<T, T>(a, stream);
}

}  // namespace

cudaError_t grad_tokens(const GradArgs& a, cudaStream_t stream) {
  switch (a.grad.dtype) {
    case DType::f16:
      return launch<f16>(a, stream);
    case DType::bf16:
      return launch<bf16>(a, stream);
    default:
      return launch<float>(a, stream);
  }
}

}  // namespace chain
}  // namespace frd
