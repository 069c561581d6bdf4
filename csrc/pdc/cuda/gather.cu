// The general kernels, for any stride, layout and dtype: every tap of every output has its own bounds test
// and load. Neighbouring threads take neighbouring elements.
#include "pdc/cuda/plan.h"
#include "pdc/cuda/window.cuh"

namespace frd {

constexpr int kGatherThreads = 256;

// The input element at offset `at` from the first tap of the first window; -1 outside the input and at the
// zeros that upsampling inserts.
__device__ __forceinline__ int source_index(const PdcAxis& a, const Divisor& upsample, int64_t at) {
  at -= a.padding;
  if (at < 0) return -1;
  if (a.upsample != 1) {
    const int64_t index = at >> 31 == 0 ? upsample.divide(static_cast<int>(at)) : at / a.upsample;
    if (index * a.upsample != at) return -1;
    at = index;
  }
  return at < a.in ? static_cast<int>(at) : -1;
}

// Strides of an image in elements.
struct GatherStrides {
  int column, row, channel;
  __device__ __forceinline__ GatherStrides(const PdcGather& p, int64_t height, int64_t width)
      : column(p.channels_last ? p.channels : 1),
        row(static_cast<int>(width) * column),
        channel(p.channels_last ? 1 : static_cast<int>(height * width)) {}
};

// Loads the window of output (y, x) in one channel of the source.
template <class T, class A, int side>
__device__ __forceinline__ void gather(A (&window)[side][side], const PdcGather& p,
                                       const GatherStrides& stride, const T* channel, int y, int x) {
  int column[side];
#pragma unroll
  for (int j = 0; j < side; ++j) {
    column[j] = source_index(p.x, p.upsample_x, x * p.x.stride + j * p.x.dilation);
  }
#pragma unroll
  for (int i = 0; i < side; ++i) {
    const int row = source_index(p.y, p.upsample_y, y * p.y.stride + i * p.y.dilation);
#pragma unroll
    for (int j = 0; j < side; ++j) {
      const bool inside = row >= 0 && column[j] >= 0;
      window[i][j] = inside ? load(channel[row * stride.row + column[j] * stride.column]) : A(0);
    }
  }
}

template <class A>
__device__ __forceinline__ void input_grad_weights(PdcKind kind, A (&w)[kPdcWeights], A theta) {
  if (kind == PdcKind::central) pdc_input_grad_weights<PdcKind::central>(w, theta);
  if (kind == PdcKind::angular) pdc_input_grad_weights<PdcKind::angular>(w, theta);
  if (kind == PdcKind::radial) pdc_input_grad_weights<PdcKind::radial>(w, theta);
  if (kind == PdcKind::vanilla) pdc_input_grad_weights<PdcKind::vanilla>(w, theta);
}

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]), or dx by the same stencil over dy. One thread per
// output. kGated: relu(y), and the gradient p.gated gated.
template <class T, PdcKind kind, bool kGated>
__global__ void __launch_bounds__(kGatherThreads) pdc_gather_stencil(PdcGather p) {
  using A = compute_t<T>;
  constexpr int side = kernel_side(kind);
  const int image = p.chunks.divide(blockIdx.x);
  const int i = (blockIdx.x - image * p.chunks.value) * kGatherThreads + threadIdx.x;
  if (i >= p.outputs) return;
  const A theta = static_cast<A>(p.theta);
  const GatherStrides source_stride(p, p.y.in, p.x.in);
  const int outer = p.inner.divide(i);
  const int inner = i - outer * static_cast<int>(p.inner.value);
  const int last = p.middle.divide(outer);
  const int middle = outer - last * static_cast<int>(p.middle.value);
  const int c = p.channels_last ? inner : last;
  const int x = p.channels_last ? middle : inner;
  const int y = p.channels_last ? last : middle;

  A window[side][side], w[kPdcWeights];
  const T* source = static_cast<const T*>(p.source) + image * (p.y.in * p.x.in * p.channels);
  gather(window, p, source_stride, source + static_cast<int64_t>(c) * source_stride.channel, y, x);
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k) w[k] = load(static_cast<const T*>(p.weight)[c * kPdcWeights + k]);
  if (p.is_input_grad) input_grad_weights(p.forward_kind, w, theta);
  const A bias = p.bias ? static_cast<A>(load(static_cast<const T*>(p.bias)[c])) : A(0);
  A sum[1] = {p.pure ? pdc_combine<kind, true>(bias, window, 0, 0, w, theta)
                     : pdc_combine<kind, false>(bias, window, 0, 0, w, theta)};
  const int64_t at = static_cast<int64_t>(image) * p.outputs + i;
  if constexpr (kGated) {
    T& gated = static_cast<T*>(p.gated)[at];
    A grad[1] = {load(gated)};
    pdc_gate(sum, grad);
    store(gated, grad[0]);
  }
  store(static_cast<T*>(p.out)[at], sum[0]);
}

// Pixels of a unit per thread.
constexpr int kGatherChunk = 16;

// dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy. In channels_last the lanes of a warp take 32
// channels; in NCHW all threads of a block take the same one.
template <class T, PdcKind kind>
__global__ void __launch_bounds__(kGatherThreads, 2) pdc_gather_weight_grad(PdcGather p) {
  using A = compute_t<T>;
  constexpr int side = kernel_side(kind);
  __shared__ A shared[kGatherThreads];
  const A theta = static_cast<A>(p.theta);
  const GatherStrides source_stride(p, p.y.in, p.x.in);
  const GatherStrides grad_stride(p, p.y.out, p.x.out);
  const int lanes = p.channels_last ? 32 : 1;
  const int threads = kGatherThreads / lanes;
  const int thread = threadIdx.x / lanes;
  const int groups = (p.channels + lanes - 1) / lanes;
  const int part = blockIdx.x / groups;
  const int c = (blockIdx.x - part * groups) * lanes + threadIdx.x % lanes;
  A sums[kPdcSums] = {};
  for (int unit = part; unit < p.units && c < p.channels; unit += p.parts) {
    const int image = p.chunks.divide(unit);
    const int first = (unit - image * static_cast<int>(p.chunks.value)) * kGatherChunk * threads;
    const T* source = static_cast<const T*>(p.source) + image * (p.y.in * p.x.in * p.channels) +
                      static_cast<int64_t>(c) * source_stride.channel;
    const T* grad = static_cast<const T*>(p.grad) + image * (p.y.out * p.x.out * p.channels) +
                    static_cast<int64_t>(c) * grad_stride.channel;
    for (int i = 0; i < kGatherChunk; ++i) {
      const int q = first + i * threads + thread;
      if (q >= p.outputs) break;
      const int y = p.inner.divide(q);
      const int x = q - y * static_cast<int>(p.inner.value);
      A window[side][side];
      gather(window, p, source_stride, source, y, x);
      const A dy = load(grad[y * grad_stride.row + x * grad_stride.column]);
      if (p.pure) {
        pdc_correlate<kind, true>(sums, window, 0, 0, dy, theta);
      } else {
        pdc_correlate<kind, false>(sums, window, 0, 0, dy, theta);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
    __syncthreads();
    shared[threadIdx.x] = sums[k];
    __syncthreads();
    for (int half = threads / 2; half > 0; half /= 2) {
      if (thread < half) shared[threadIdx.x] += shared[threadIdx.x + half * lanes];
      __syncthreads();
    }
    if (thread == 0 && c < p.channels)
      static_cast<A*>(p.sums)[(static_cast<int64_t>(part) * kPdcSums + k) * p.channels + c] =
          shared[threadIdx.x];
  }
}

constexpr int kReduceLanes = 32;
constexpr int kReduceRows = 16;

// sums [parts, 10, C] -> dw [C, 9], db [C], in a fixed order: a row of threads adds every kReduceRows-th
// part, then the rows are added.
template <class T>
__global__ void __launch_bounds__(kReduceLanes* kReduceRows)
    pdc_reduce_weight_grad(const compute_t<T>* __restrict__ sums, int parts, int channels, T* __restrict__ dw,
                           T* __restrict__ db) {
  using A = compute_t<T>;
  __shared__ A shared[kReduceRows][kReduceLanes];
  const int lane = threadIdx.x % kReduceLanes;
  const int row = threadIdx.x / kReduceLanes;
  const int k = blockIdx.x % kPdcSums;
  const int c = blockIdx.x / kPdcSums * kReduceLanes + lane;
  A sum = 0;
  if (c < channels) {
    const int64_t pitch = static_cast<int64_t>(kPdcSums) * channels;
    const A* from = sums + static_cast<int64_t>(k) * channels + c;
#pragma unroll 4
    for (int part = row; part < parts; part += kReduceRows) sum += from[part * pitch];
  }
  shared[row][lane] = sum;
  __syncthreads();
  if (row != 0 || c >= channels) return;
  for (int r = 1; r < kReduceRows; ++r) sum += shared[r][lane];
  store(k < kPdcWeights ? dw[static_cast<int64_t>(c) * kPdcWeights + k] : db[c], sum);
}

namespace {

int lanes_per_pixel(const PdcProblem& p) { return p.channels_last ? 32 : 1; }

PdcGather stencil_args(const PdcProblem& p, const PdcAxis& y, const PdcAxis& x) {
  PdcGather g{};
  g.y = y;
  g.x = x;
  g.upsample_y = Divisor(y.upsample);
  g.upsample_x = Divisor(x.upsample);
  g.channels = static_cast<int>(p.channels);
  g.channels_last = p.channels_last;
  g.theta = p.theta;
  g.pure = p.theta == 1;
  g.source = p.source;
  g.weight = p.weight;
  g.bias = p.bias;
  g.grad = p.grad;
  g.gated = p.gated;
  g.out = p.out;
  g.sums = p.sums;
  return g;
}

PdcGather weight_grad_args(const PdcProblem& p) {
  PdcGather g = stencil_args(p, p.y, p.x);
  const int64_t pixels = p.y.out * p.x.out;
  const int64_t chunk = kGatherThreads / lanes_per_pixel(p) * kGatherChunk;
  g.outputs = static_cast<int>(pixels);
  g.inner = Divisor(p.x.out);
  g.chunks = Divisor(ceil_divide(pixels, chunk));
  const int64_t units = p.batch * g.chunks.value;
  g.units = static_cast<int>(units);
  g.parts = balanced_parts(
      units, std::min<int64_t>(kMaxParts, kTargetBlocks / ceil_divide(p.channels, lanes_per_pixel(p))));
  return g;
}

template <typename F>
void with_kind_and_dtype(PdcKind kind, DType dtype, F f) {
  with_kind(kind, [&](auto k) { with_dtype(dtype, [&](auto element) { f(k, element); }); });
}

// Launches the stencil of `kind` over g.source.
void launch_stencil(PdcGather g, PdcKind kind, const PdcProblem& p, cudaStream_t stream) {
  const int64_t outputs = g.y.out * g.x.out * p.channels;
  if (outputs == 0) return;
  g.outputs = static_cast<int>(outputs);
  g.inner = Divisor(p.channels_last ? p.channels : g.x.out);
  g.middle = Divisor(p.channels_last ? g.x.out : g.y.out);
  g.chunks = Divisor(ceil_divide(outputs, kGatherThreads));
  const unsigned blocks = static_cast<unsigned>(p.batch * g.chunks.value);
  with_kind_and_dtype(kind, p.dtype, [&](auto k, auto element) {
    using T = decltype(element);
    if (g.gated) {
      FRD_LAUNCH((pdc_gather_stencil<T, decltype(k)::value, true>), blocks, kGatherThreads, 0, stream, g);
    } else {
      FRD_LAUNCH((pdc_gather_stencil<T, decltype(k)::value, false>), blocks, kGatherThreads, 0, stream, g);
    }
  });
}

}  // namespace

int pdc_gather_parts(const PdcProblem& p) { return weight_grad_args(p).parts; }

cudaError_t pdc_gather_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  if (!backward) {
    launch_stencil(stencil_args(p, p.y, p.x), p.kind, p, stream);
    return cudaGetLastError();
  }
  if (p.out) {
    PdcGather g = stencil_args(p, input_grad_axis(p.y, p.kind), input_grad_axis(p.x, p.kind));
    g.source = p.grad;
    g.is_input_grad = true;
    g.forward_kind = p.kind;
    launch_stencil(g, input_grad_kind(p.kind), p, stream);
  }
  if (p.sums) {
    const PdcGather g = weight_grad_args(p);
    const unsigned blocks = static_cast<unsigned>(g.parts * ceil_divide(p.channels, lanes_per_pixel(p)));
    with_kind_and_dtype(p.kind, p.dtype, [&](auto k, auto element) {
      FRD_LAUNCH((pdc_gather_weight_grad<decltype(element), decltype(k)::value>), blocks, kGatherThreads, 0,
                 stream, g);
    });
  }
  return cudaGetLastError();
}

int pdc_parts_cuda(const PdcProblem& p) {
  if (pdc_channels_last_fit(p)) return pdc_channels_last_parts(p);
  return pdc_nchw_fit(p) ? pdc_nchw_parts(p) : pdc_gather_parts(p);
}

cudaError_t pdc_forward_cuda(const PdcProblem& p, cudaStream_t stream) {
  if (pdc_channels_last_fit(p)) return pdc_channels_last_launch(p, false, stream);
  return pdc_nchw_fit(p) ? pdc_nchw_launch(p, false, stream) : pdc_gather_launch(p, false, stream);
}

cudaError_t pdc_backward_cuda(const PdcProblem& p, cudaStream_t stream) {
  const cudaError_t error = pdc_channels_last_fit(p) ? pdc_channels_last_launch(p, true, stream)
                            : pdc_nchw_fit(p)        ? pdc_nchw_launch(p, true, stream)
                                                     : pdc_gather_launch(p, true, stream);
  if (error != cudaSuccess || !p.sums) return error;
  const int parts = pdc_parts_cuda(p);
  const int channels = static_cast<int>(p.channels);
  const unsigned blocks = static_cast<unsigned>(ceil_divide(channels, kReduceLanes) * kPdcSums);
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    FRD_LAUNCH((pdc_reduce_weight_grad<T>), blocks, kReduceLanes * kReduceRows, 0, stream,
               static_cast<const compute_t<T>*>(p.sums), parts, channels, static_cast<T*>(p.dw),
               static_cast<T*>(p.db));
  });
  return cudaGetLastError();
}

}  // namespace frd
