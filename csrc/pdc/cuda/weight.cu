// The weight transform v[plus_k] += w_k, v[minus_k] -= theta w_k and its transpose.
#include "core/cuda_compat.h"
#include "pdc/cuda/launch.h"

namespace frd {
namespace {

constexpr int kPdcWeightThreads = 128;

// A 16-bit type: bits of its fraction, exponent field (of a float) of its smallest ulp that is a normal
// float, and the ulp of its last binade, whose largest value has no finite one above it.
template <typename T>
struct Format;
template <>
struct Format<bf16> {
  static constexpr int kFraction = 7, kMinUlp = 1;
  static constexpr float kLastUlp = 0x1p120f;
};
template <>
struct Format<f16> {
  static constexpr int kFraction = 10, kMinUlp = 103;
  static constexpr float kLastUlp = 0x1p5f;
};

// spacing() of a value of T below the last binade: a power of two.
template <typename T>
__device__ float ulp_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255u) - Format<T>::kFraction;
  bits = static_cast<uint32_t>(exponent < Format<T>::kMinUlp ? Format<T>::kMinUlp : exponent) << 23;
  memcpy(&v, &bits, 4);
  return v;
}

__device__ float reciprocal(float power_of_two) {
  uint32_t bits;
  memcpy(&bits, &power_of_two, 4);
  bits = (254u << 23) - bits;
  memcpy(&power_of_two, &bits, 4);
  return power_of_two;
}

// Rounds half away from zero. What is added is the number below 0.5, which 0.5 itself would take to 1.
__device__ float nearest_integer(float v) { return truncf(v + copysignf(0x1.fffffep-2f, v)); }

// round_to_sum() for the target 0 in float, to the same bits: what it adds and compares are multiples of the
// smallest ulp of a tap and fewer than 2^24 of them, so that no operation rounds. Returns false where that
// does not hold; `out` is then to be written anew.
template <int n, typename T>
__device__ bool round_to_zero_sum(const float* v, T* out) {
  constexpr int kMaxMoves = 9;
  // The taps now and as first rounded, and what that rounding took away.
  float now[n], first[n], error[n];
  // `lost`: what the additions to `sum` rounded away.
  float sum = 0, lost = 0, limit = 0, smallest = Format<T>::kLastUlp;
  bool exact = true;
  FRD_UNROLL
  for (int i = 0; i < n; ++i) {
    store(out[i], v[i]);
    now[i] = first[i] = load(out[i]);
    error[i] = v[i] - now[i];
    const float next = sum + now[i], added = next - sum;
    lost += (sum - (next - added)) + (now[i] - added);
    sum = next;
    if (now[i] != 0) {
      const float ulp = ulp_of<T>(now[i]);
      limit = fmaxf(limit, ulp);
      smallest = fminf(smallest, ulp);
    }
    // A tap that underflows has no error in ulps.
    exact = exact && (now[i] != 0 || v[i] == 0);
  }
  float residue = sum + lost;
  // False for a NaN.
  const auto fits = [&] { return limit <= 0x1p20f * smallest && fabsf(residue) <= 0x1p22f * smallest; };
  // Infinite and NaN taps have a large ulp. A large `smallest` keeps `error` above the subnormal floats.
  if (!(exact && limit < Format<T>::kLastUlp && smallest >= 0x1p-100f && fits())) return false;
  for (int count = 0; count < kMaxMoves && residue != 0; ++count) {
    float best = residue, moved_to = 0;
    int move = -1;
    FRD_UNROLL
    for (int i = 0; i < n; ++i) {
      // From 0 every step is allowed.
      const float ulp = now[i] == 0 ? smallest : ulp_of<T>(now[i]);
      const float inverse = reciprocal(ulp);
      // How far the tap should move, and may move up and down if its `error` were 0.
      float way = -residue, part = 0;
      const float up = limit - (now[i] - first[i]), down = -limit - (now[i] - first[i]);
      const bool above = way - up > error[i], below = way - down < error[i];
      if (above || below) way = above ? up : down;
      way *= inverse;
      if (above || below) {
        part = error[i] * inverse;
        // A whole number of ulps and less than half a one round to the former.
        const bool whole = truncf(way) == way;
        if (whole && fabsf(part) < 0.5f) part = 0;
        exact = exact && (way + part) - way == part && (way + part) - part == way;
      }
      T rounded;
      store(rounded, now[i] + ulp * nearest_integer(way + part));
      const float candidate = load(rounded);
      const float left = residue + (candidate - now[i]);
      if (fabsf(left) < fabsf(best)) {
        best = left;
        move = i;
        moved_to = candidate;
      }
    }
    if (!exact) return false;
    if (move < 0) return true;
    FRD_UNROLL
    for (int i = 0; i < n; ++i)
      if (i == move) now[i] = moved_to;
    store(out[move], moved_to);
    residue = best;
    smallest = fminf(smallest, ulp_of<T>(moved_to));
    if (residue != 0 && !fits()) return false;
  }
  return true;
}

// round_taps(), where possible without arithmetic in double, which is slow on a GPU. pure: theta is 1
template <PdcKind kind, typename T>
__device__ void round_taps_fast(const compute_t<T>* v, double theta, bool pure, T* out) {
  if constexpr (sizeof(T) == 2 && (kind == PdcKind::central || kind == PdcKind::angular))
    if (pure && round_to_zero_sum<kPdcWeights>(v, out)) return;
  round_taps<kind>(v, theta, out);
}

// Copies `count` elements with all threads of the block; of 16 bits two at a time.
template <typename T>
__device__ void copy_elements(T* to, const T* from, int count) {
  int done = 0;
  if constexpr (sizeof(T) == 2) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 4 == 0) {
      for (int i = threadIdx.x; i < count / 2; i += kPdcWeightThreads)
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
      done = count / 2 * 2;
    }
  }
  for (int i = done + threadIdx.x; i < count; i += kPdcWeightThreads) to[i] = from[i];
}

// in [pairs, 9 or side * side] -> out. One thread transforms one pair of channels. The pairs of a block are
// contiguous, so they pass through shared memory to be read and written coalesced; the odd strides 9 and 25
// keep the threads' accesses there free of bank conflicts. factor: theta as the arithmetic has it; pure: 1
template <PdcKind kind, typename In, typename Out, bool kTransposed>
__global__ void __launch_bounds__(kPdcWeightThreads)
    pdc_weight_kernel(const In* __restrict__ in, Out* __restrict__ out, int64_t pairs, double theta,
                      compute_t<In> factor, bool pure) {
  constexpr int kTaps = kernel_side(kind) * kernel_side(kind);
  constexpr int kIn = kTransposed ? kTaps : kPdcWeights;
  constexpr int kOut = kTransposed ? kPdcWeights : kTaps;
  using A = compute_t<In>;
  __shared__ __align__(4) In staged_in[kPdcWeightThreads * kIn];
  __shared__ __align__(4) Out staged_out[kPdcWeightThreads * kOut];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPdcWeightThreads;
  const int count = static_cast<int>(pairs - first < kPdcWeightThreads ? pairs - first : kPdcWeightThreads);
  copy_elements(staged_in, in + first * kIn, count * kIn);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    A source[kIn], result[kOut];
    for (int i = 0; i < kIn; ++i) source[i] = load(staged_in[threadIdx.x * kIn + i]);
    Out* target = staged_out + threadIdx.x * kOut;
    if constexpr (kTransposed) {
      transform_transposed<kind>(source, factor, result);
      for (int i = 0; i < kOut; ++i) store(target[i], static_cast<compute_t<Out>>(result[i]));
    } else {
      transform<kind>(source, factor, result);
      compute_t<Out> rounded[kOut];
      for (int i = 0; i < kOut; ++i) rounded[i] = static_cast<compute_t<Out>>(result[i]);
      round_taps_fast<kind, Out>(rounded, theta, pure, target);
    }
  }
  __syncthreads();
  copy_elements(out + first * kOut, staged_out, count * kOut);
}

template <bool kTransposed>
cudaError_t launch(const PdcWeightArgs& a, int64_t pairs, cudaStream_t stream) {
  if (pairs == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>((pairs + kPdcWeightThreads - 1) / kPdcWeightThreads);
  with_kind(a.kind, [&](auto kind) {
    with_dtype(a.in_dtype, [&](auto in) {
      with_dtype(a.out_dtype, [&](auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        FRD_LAUNCH((pdc_weight_kernel<decltype(kind)::value, In, Out, kTransposed>), blocks,
                   kPdcWeightThreads, 0, stream, static_cast<const In*>(a.in), static_cast<Out*>(a.out),
                   pairs, a.theta, static_cast<compute_t<In>>(a.theta), a.theta == 1);
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t pdc_weight_forward_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream) {
  return launch<false>(args, pairs, stream);
}

cudaError_t pdc_weight_transposed_cuda(const PdcWeightArgs& args, int64_t pairs, cudaStream_t stream) {
  return launch<true>(args, pairs, stream);
}

}  // namespace frd
