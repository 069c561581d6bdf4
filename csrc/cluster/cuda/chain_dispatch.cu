// From the last centres back to the tokens.
#include "cluster/cuda/chain_rules.cuh"

namespace frd {
namespace chain {

// Tokens and channels of a block's tile; centres of the last round that it takes at a time.
constexpr int kDispatchSide = 64, kDispatchCentres = 4;

struct DispatchShared {
  float gate[kDispatchCentres][kDispatchSide];  // of the tile's tokens; released: in the first row, weights
  float last[kDispatchCentres][kDispatchSide];  // of the last centres' channels
  float link[kDispatchSide + kDispatchSide / 16][kDispatchCentres];  // [o + o / 16]: banks apart
  int32_t end[kDispatchSide];                                        // released: a token's last centre
};

// m = 16 numbers of a row [count] from `begin` on, with zeros behind its end.
FRD_DEVICE void load_16(const float* row, int begin, int count, float (&m)[16]) {
  FRD_UNROLL
  for (int i = 0; i < 16; i += 4) {
    float4 four{0.f, 0.f, 0.f, 0.f};
    if (count % 4 == 0) {
      if (begin + i < count) four = *reinterpret_cast<const float4*>(row + begin + i);
    } else {
      if (begin + i < count) four.x = row[begin + i];
      if (begin + i + 1 < count) four.y = row[begin + i + 1];
      if (begin + i + 2 < count) four.z = row[begin + i + 2];
      if (begin + i + 3 < count) four.w = row[begin + i + 3];
    }
    m[i] = four.x, m[i + 1] = four.y, m[i + 2] = four.z, m[i + 3] = four.w;
  }
}

// A tile of out: dense, sigmoid(alpha M_1 P + beta) R_T with the links P, of which T = 1 has none; else the
// product of the similarities along a token's chain of centres times the centre at its end.
template <class T, bool kDense>
class Dispatch {
 public:
  __device__ Dispatch(const Forward& args, DispatchShared& shared) : a_(args), s_(shared) {
    const int tiles = (args.channels + kDispatchSide - 1) / kDispatchSide, tokens = args.round[0].tokens();
    const int blocks = (tokens + kDispatchSide - 1) / kDispatchSide * tiles;
    const int block = static_cast<int>(blockIdx.x % blocks);
    item_ = blockIdx.x / blocks;
    first_token_ = block / tiles * kDispatchSide, first_channel_ = block % tiles * kDispatchSide;
    const int tokens_left = tokens - first_token_, channels_left = args.channels - first_channel_;
    tokens_ = tokens_left < kDispatchSide ? tokens_left : kDispatchSide;
    channels_ = channels_left < kDispatchSide ? channels_left : kDispatchSide;
    centres_ = args.round[0].centres();
    last_ = args.round[args.count - 1].centres();
    saved_ = args.saved + item_ * args.at.size;
    links_ = args.links + item_ * args.link_stride;
    by_token_ = args.out.token == 1;
  }

  __device__ void run() {
    // Of round 1, and so of a launch before the previous one.
    float cosine[16] = {};
    if (kDense && a_.count > 1) load_cosines(0, cosine);
    wait_for_previous();
    let_next_start();
    if (!kDense) follow_chains();
    float sum[8][2] = {};
    for (int first = 0; first < last_; first += kDispatchCentres) {
      if (first > 0) __syncthreads();
      load_last(first);
      if (kDense && a_.count == 1) gates_of_matrix(first);
      if (kDense && a_.count > 1) gates_of_links(first, cosine);
      __syncthreads();
      if (kDense)
        add_gates(first, sum);
      else
        add_chains(first, sum);
    }
    write(sum);
  }

 private:
  __device__ const float* matrix() const {
    return saved_ + a_.at.round[0].matrix + static_cast<int64_t>(first_token_) * centres_;
  }
  // Those of token threadIdx.x / 4 with a quarter of 64 centres.
  __device__ void load_cosines(int first, float (&m)[16]) const {
    const int token = threadIdx.x / 4;
    if (token < tokens_)
      load_16(matrix() + static_cast<int64_t>(token) * centres_, first + threadIdx.x % 4 * 16, centres_, m);
  }

  __device__ float gate(float product) const { return sigmoid(a_.alpha[0] * product + a_.beta[0]); }

  __device__ void gates_of_matrix(int first) const {
    const int token = threadIdx.x / 4, j = threadIdx.x % 4;
    if (token < tokens_ && first + j < last_)
      s_.gate[j][token] = gate(matrix()[static_cast<int64_t>(token) * centres_ + first + j]);
  }

  // cosine: of the first 64 centres in the first call, then of any
  __device__ void gates_of_links(int first, float (&cosine)[16]) const {
    const int token = threadIdx.x / 4, part = threadIdx.x % 4;
    float sum[kDispatchCentres] = {};
    for (int begin = 0; begin < centres_; begin += kDispatchSide) {
      if (begin > 0) __syncthreads();
      const bool inside = begin + token < centres_ && first + part < last_;
      s_.link[token + token / 16][part] =
          inside ? links_[static_cast<int64_t>(begin + token) * last_ + first + part] : 0.f;
      if (begin > 0 || (first > 0 && centres_ > kDispatchSide)) load_cosines(begin, cosine);
      __syncthreads();
      FRD_UNROLL
      for (int i = 0; i < 16; ++i) {
        const float4 link = *reinterpret_cast<const float4*>(s_.link[17 * part + i]);
        sum[0] += cosine[i] * link.x, sum[1] += cosine[i] * link.y;
        sum[2] += cosine[i] * link.z, sum[3] += cosine[i] * link.w;
      }
    }
    FRD_UNROLL
    for (int j = 0; j < kDispatchCentres; ++j) {
      sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 1);
      sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], 2);
      if (j == part) s_.gate[j][token] = gate(sum[j]);
    }
  }

  // Weight and last centre of each token.
  __device__ void follow_chains() const {
    const int token = threadIdx.x;
    if (token >= tokens_) return;
    int end = a_.labels[item_ * a_.label_stride + first_token_ + token];
    float weight = gate_of(a_, 0, saved_[a_.at.round[0].cosine + first_token_ + token]);
    if (a_.count > 1) {
      weight *= links_[end];
      end = reinterpret_cast<const int32_t*>(links_)[centres_ + end];
    }
    s_.gate[0][token] = weight, s_.end[token] = end;
  }

  __device__ void load_last(int first) const {
    const int j = threadIdx.x / kDispatchSide, c = threadIdx.x % kDispatchSide;
    if (first + j < last_ && c < channels_)
      s_.last[j][c] = saved_[a_.at.round[a_.count - 1].rows + static_cast<int64_t>(first + j) * a_.channels +
                             first_channel_ + c];
  }

  // A thread has two neighbours of what is contiguous in `out`, for each of eight of the other.
  __device__ void add_gates(int first, float (&sum)[8][2]) const {
    const float *inner = by_token_ ? s_.gate[0] : s_.last[0], *outer = by_token_ ? s_.last[0] : s_.gate[0];
    FRD_UNROLL
    for (int j = 0; j < kDispatchCentres; ++j, inner += kDispatchSide, outer += kDispatchSide) {
      if (first + j >= last_) break;
      const float2 pair = *reinterpret_cast<const float2*>(inner + lane_of_warp() * 2);
      FRD_UNROLL
      for (int u = 0; u < 8; u += 4) {
        const float4 four = *reinterpret_cast<const float4*>(outer + warp_of_block() * 8 + u);
        sum[u][0] += pair.x * four.x, sum[u][1] += pair.y * four.x;
        sum[u + 1][0] += pair.x * four.y, sum[u + 1][1] += pair.y * four.y;
        sum[u + 2][0] += pair.x * four.z, sum[u + 2][1] += pair.y * four.z;
        sum[u + 3][0] += pair.x * four.w, sum[u + 3][1] += pair.y * four.w;
      }
    }
  }
  // The others' product is not taken, as it may be NaN.
  __device__ void add_chains(int first, float (&sum)[8][2]) const {
    FRD_UNROLL
    for (int u = 0; u < 8; ++u) FRD_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int outer = warp_of_block() * 8 + u, inner = lane_of_warp() * 2 + e;
      const int token = by_token_ ? inner : outer, j = s_.end[token < tokens_ ? token : 0] - first;
      if (j >= 0 && j < kDispatchCentres)
        sum[u][e] = s_.gate[0][token] * s_.last[j][by_token_ ? outer : inner];
    }
  }

  __device__ void write(const float (&sum)[8][2]) const {
    const TokenView& out = a_.out;
    const int64_t step = by_token_ ? out.channel : out.token, inner = by_token_ ? out.token : out.channel;
    const int begin = warp_of_block() * 8, pair = lane_of_warp() * 2;
    const int count = by_token_ ? channels_ : tokens_, width = by_token_ ? tokens_ : channels_;
    T* to = static_cast<T*>(out.data) + item_ * out.batch + first_token_ * out.token +
            first_channel_ * out.channel + begin * step + pair * inner;
    const bool wide = inner == 1 && step % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
    FRD_UNROLL
    for (int u = 0; u < 8; ++u, to += step) {
      if (begin + u >= count || pair >= width) return;
      if (wide && pair + 1 < width) {
        struct alignas(2 * sizeof(T)) Two {
          T v[2];
        } two;
        store(two.v[0], sum[u][0]), store(two.v[1], sum[u][1]);
        *reinterpret_cast<Two*>(to) = two;
      } else {
        store(to[0], sum[u][0]);
        if (pair + 1 < width) store(to[inner], sum[u][1]);
      }
    }
  }

  const Forward& a_;
  DispatchShared& s_;
  int64_t item_;
  int first_token_, first_channel_, tokens_, channels_;  // of the tile
  int centres_, last_;                                   // of the first and the last round
  const float *saved_, *links_;
  bool by_token_;  // neighbouring tokens are neighbours in `out`
};

template <class T, bool kDense>
__global__ void __launch_bounds__(kBlockThreads) dispatch_kernel(const __grid_constant__ Forward a) {
  FRD_DYNAMIC_SHARED(uint4, shared);
  Dispatch<T, kDense>(a, *reinterpret_cast<DispatchShared*>(shared)).run();
}

namespace {

template <class T>
cudaError_t run(const Forward& a, cudaStream_t stream) {
  const auto tiles = [](int64_t n) { return (n + kDispatchSide - 1) / kDispatchSide; };
  const int64_t blocks = a.batch * tiles(a.round[0].tokens()) * tiles(a.channels);
  const auto kernel = a.dense ? dispatch_kernel<T, true> : dispatch_kernel<T, false>;
  return FRD_LAUNCH_DEPENDENT(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads),
                              static_cast<int>(sizeof(DispatchShared)), stream, a);
}

}  // namespace

cudaError_t run_dispatch(const Forward& a, cudaStream_t stream) {
  return a.dtype == DType::f32   ? run<f32>(a, stream)
         : a.dtype == DType::f16 ? run<f16>(a, stream)
                                 : run<bf16>(a, stream);
}

}  // namespace chain
}  // namespace frd
