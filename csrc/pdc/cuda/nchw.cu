// The tiled kernels for NCHW. A thread computes kRows rows of one 16-byte vector of columns, or of a single
// column if rows are not aligned. It reads x directly from global memory: the L1 cache serves the rows and
// neighbours that threads share, and staging in shared memory would cost more instructions than the two
// scalar loads at the ends of a vector.
#include "pdc/cuda/plan.h"
#include "pdc/cuda/window.cuh"
#include "pdc/cuda/words.cuh"

namespace frd {

constexpr int kNchwThreads = 128;

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack_columns(float (&v)[kPerVector<T>], const uint4& vector) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[kPerWord<T>];
    unpack(words[i], pair, T{});
#pragma unroll
    for (int j = 0; j < kPerWord<T>; ++j) v[i * kPerWord<T> + j] = pair[j];
  }
}
template <class T>
__device__ __forceinline__ void load_columns(float (&v)[kPerVector<T>], const T* from, bool inside) {
  unpack_columns<T>(v, load_words_if(inside, from));
}
template <class T>
__device__ __forceinline__ void load_columns(float (&v)[1], const T* from, bool inside) {
  v[0] = load_element_if(inside, from);
}
template <class T>
__device__ __forceinline__ void load_written_columns(float (&v)[kPerVector<T>], const T* from, bool inside) {
  unpack_columns<T>(v, load_written_if<uint4>(inside, from));
}
template <class T>
__device__ __forceinline__ void load_written_columns(float (&v)[1], const T* from, bool inside) {
  v[0] = load(load_written_if<T>(inside, from));
}

template <class T>
__device__ __forceinline__ void store_columns(bool inside, T* to, const float (&v)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float pair[kPerWord<T>];
#pragma unroll
    for (int j = 0; j < kPerWord<T>; ++j) pair[j] = v[i * kPerWord<T> + j];
    words[i] = pack(pair, T{});
  }
  store_words_if(inside, to, uint4{words[0], words[1], words[2], words[3]});
}
template <class T>
__device__ __forceinline__ void store_columns(bool inside, T* to, const float (&v)[1]) {
  store_element_if(inside, to, v[0]);
}

// Loads rows y, y + dy, ... of plane [height, width]: kColumns columns from x on and `reach` more on both
// sides, which are dx apart if kColumns is 1; zeros outside. The kColumns are all inside or all outside.
template <int reach, int kColumns, class T, int rows>
__device__ __forceinline__ void load_window(float (&window)[rows][kColumns + 2 * reach], const T* plane,
                                            int height, int width, int y, int x, int dy, int dx) {
  const auto column_inside = [&](int c) { return static_cast<unsigned>(c) < static_cast<unsigned>(width); };
  const T* row = plane + (static_cast<int64_t>(y) * width + x);
#pragma unroll
  for (int r = 0; r < rows; ++r, y += dy, row += static_cast<int64_t>(dy) * width) {
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(height);
    float v[kColumns];
    load_columns(v, row, inside & column_inside(x));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) window[r][reach + j] = v[j];
#pragma unroll
    for (int j = 1; j <= reach; ++j) {
      const int left = -j * dx;
      const int right = kColumns - 1 + j * dx;
      window[r][reach - j] = load_element_if(inside & column_inside(x + left), row + left);
      window[r][reach + kColumns - 1 + j] = load_element_if(inside & column_inside(x + right), row + right);
    }
  }
}

// The weights w [9] of a channel, from p.weight [C, 9].
template <class T>
__device__ __forceinline__ void load_weights(float (&w)[kPdcWeights], const PdcTiles& p, int channel) {
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k)
    w[k] = load(static_cast<const T*>(p.weight)[channel * kPdcWeights + k]);
}

// Computes and stores the outputs of a window: rows y, y + dy, ... of plane [height, width] from column x on.
// kGated: stores their ReLU, and gates the gradients at the same places of `gated`.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns, bool kGated, int rows, int columns>
__device__ __forceinline__ void stencil_rows(const float (&window)[rows][columns],
                                             const float (&w)[kPdcWeights], float bias, float theta, T* plane,
                                             T* gated, int height, int width, int y, int x, int dy) {
  T* to = plane + (static_cast<int64_t>(y) * width + x);
  const int64_t to_gated = kGated ? gated - plane : 0;
  const bool inside_x = static_cast<unsigned>(x) < static_cast<unsigned>(width);
#pragma unroll
  for (int r = 0; r < kRows; ++r, y += dy, to += static_cast<int64_t>(dy) * width) {
    const bool inside = inside_x & (static_cast<unsigned>(y) < static_cast<unsigned>(height));
    float sums[kColumns], grad[kColumns];
    if constexpr (kGated) load_written_columns<T>(grad, to + to_gated, inside);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] = pdc_combine<kind, pure>(bias, window, r, j, w, theta);
    if constexpr (kGated) {
      pdc_gate(sums, grad);
      store_columns(inside, to + to_gated, grad);
    }
    store_columns(inside, to, sums);
  }
}

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]); kGated: relu(y), and the gradient p.gated gated;
// without the bound ptxas would spill some of these
template <class T, PdcKind kind, bool pure, int kRows, int kColumns, bool kGated>
__global__ void __launch_bounds__(kNchwThreads, kGated ? 2 : 0) pdc_nchw_forward(PdcTiles p) {
  constexpr int reach = pdc_reach(kind);
  const int unit = blockIdx.x * kNchwThreads + threadIdx.x;
  if (unit >= p.units) return;
  const PdcTile tile = tile_of(p, unit);
  const int channel = tile.image - p.groups.divide(tile.image) * static_cast<int>(p.groups.value);
  const int y = p.y.first(tile.row, kRows);
  const int x = tile.column * kColumns;
  const T* plane =
      static_cast<const T*>(p.source) + static_cast<int64_t>(tile.image) * (p.y.in_size * p.x.in_size);
  const int64_t first = static_cast<int64_t>(tile.image) * (p.y.out_size * p.x.out_size);
  float window[kRows + 2 * reach][kColumns + 2 * reach], w[kPdcWeights];
  load_window<reach, kColumns>(window, plane, p.y.in_size, p.x.in_size,
                               y + p.y.in_begin - reach * p.y.dilation, x + p.x.in_begin, p.y.dilation,
                               p.x.dilation);
  load_weights<T>(w, p, channel);
  const float bias = p.bias ? load(static_cast<const T*>(p.bias)[channel]) : 0.f;
  stencil_rows<T, kind, pure, kRows, kColumns, kGated>(
      window, w, bias, p.theta, static_cast<T*>(p.out) + first,
      kGated ? static_cast<T*>(p.gated) + first : nullptr, p.y.out_size, p.x.out_size, y + p.y.out_begin,
      x + p.x.out_begin, p.y.dilation);
}

// dx, the same stencil over dy, and dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy. A warp takes
// one channel and a part of the units of all images, so that the sums stay in registers until the end.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(kNchwThreads) pdc_nchw_backward(PdcTiles p) {
  constexpr int reach = pdc_reach(kind);
  const int lane = threadIdx.x % 32;
  const int warp = blockIdx.x * (kNchwThreads / 32) + threadIdx.x / 32;
  const int part = p.groups.divide(warp);
  const int channel = warp - part * static_cast<int>(p.groups.value);
  if (part >= p.parts) return;
  float w[kPdcWeights];
  float sums[kPdcSums] = {};
  load_weights<T>(w, p, channel);
  pdc_input_grad_weights<kind>(w, p.theta);
  for (int unit = part * 32 + lane; unit < p.units; unit += p.parts * 32) {
    const PdcTile tile = tile_of(p, unit);
    const int first = p.y.first(tile.row, kRows);
    const int column = tile.column * kColumns;
    const int y = first + p.y.in_begin;
    const int x = column + p.x.in_begin;
    const int out_y = first + p.y.out_begin;
    const int out_x = column + p.x.out_begin;
    const int64_t plane = static_cast<int64_t>(tile.image) * p.groups.value + channel;
    float grad[kRows + 2 * reach][kColumns + 2 * reach];
    load_window<reach, kColumns>(grad, static_cast<const T*>(p.grad) + plane * (p.y.out_size * p.x.out_size),
                                 p.y.out_size, p.x.out_size, out_y - reach * p.y.dilation, out_x,
                                 p.y.dilation, p.x.dilation);
    if (p.out) {
      stencil_rows<T, input_grad_kind(kind), pure, kRows, kColumns, false>(
          grad, w, 0.f, p.theta, static_cast<T*>(p.out) + plane * (p.y.in_size * p.x.in_size), nullptr,
          p.y.in_size, p.x.in_size, y, x, p.y.dilation);
    }
    if (p.sums) {
      float window[kRows + 2 * reach][kColumns + 2 * reach];
      load_window<reach, kColumns>(
          window, static_cast<const T*>(p.source) + plane * (p.y.in_size * p.x.in_size), p.y.in_size,
          p.x.in_size, y - reach * p.y.dilation, x, p.y.dilation, p.x.dilation);
      const bool inside = static_cast<unsigned>(out_x) < static_cast<unsigned>(p.x.out_size);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool valid =
            inside & (static_cast<unsigned>(out_y + r * p.y.dilation) < static_cast<unsigned>(p.y.out_size));
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          pdc_correlate_if<kind, pure>(valid, sums, window, r, j, grad[r + reach][j + reach], p.theta);
      }
    }
  }
  if (!p.sums) return;
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
    float sum = sums[k];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) p.sums[(static_cast<int64_t>(part) * kPdcSums + k) * p.groups.value + channel] = sum;
  }
}

namespace {

// Rows of a thread. More rows share more differences and loads (with 8 x 8 outputs the angular kind takes 2.8
// subtractions per output instead of 8), as long as the windows fit the registers; single columns need fewer.
constexpr int rows_of(PdcKind kind, int columns, bool backward) {
  const bool radial = kind == PdcKind::radial;
  if (columns == 1) return radial ? 8 : 16;
  return radial && backward && columns == 8 ? 4 : 8;
}

// Whether rows are whole aligned vectors, so that none crosses the edge of x or of dy.
bool vectors_fit(const PdcProblem& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2;
  return p.x.dilation == 1 && p.x.in == p.x.out && p.x.in * element % 16 == 0 && all_aligned(p, 16);
}

Plan nchw_plan(const PdcProblem& p, bool backward) {
  PdcTiles t{};
  set_pointers(t, p);
  const Frame fy = frame_of(p.y, p.kind, backward);
  const Frame fx = frame_of(p.x, p.kind, backward);
  t.y = tile_axis(p.y, fy);
  t.x = tile_axis(p.x, fx);
  t.groups = Divisor(p.channels);
  const int columns = !vectors_fit(p) ? 1 : p.dtype == DType::f32 ? 4 : 8;
  t.y.per_phase =
      Divisor(ceil_divide(ceil_divide(fy.size, p.y.dilation), rows_of(p.kind, columns, backward)));
  const int64_t rows = t.y.per_phase.value * phases_of(p.y, fy);
  const int64_t per_row = ceil_divide(fx.size, columns);
  t.per_row = Divisor(per_row);
  t.per_image = Divisor(rows * per_row);
  const int64_t units = p.batch * rows * per_row;
  t.units = static_cast<int>(backward ? units : units * p.channels);
  const int64_t warps = kTargetBlocks * (kNchwThreads / 32);
  t.parts = balanced_parts(ceil_divide(units, 32), std::min<int64_t>(kMaxParts, warps / p.channels));
  return {t, units * p.channels};
}

template <class T, PdcKind kind, bool pure, int columns>
void launch(const PdcTiles& t, bool backward, cudaStream_t stream) {
  if (backward) {
    const int64_t warps = static_cast<int64_t>(t.parts) * t.groups.value;
    FRD_LAUNCH((pdc_nchw_backward<T, kind, pure, rows_of(kind, columns, true), columns>),
               static_cast<unsigned>(ceil_divide(warps, kNchwThreads / 32)), kNchwThreads, 0, stream, t);
  } else {
    const unsigned blocks = static_cast<unsigned>(ceil_divide(t.units, kNchwThreads));
    constexpr int rows = rows_of(kind, columns, false);
    if (t.gated) {
      if constexpr (pure)
        FRD_LAUNCH((pdc_nchw_forward<T, kind, true, rows, columns, true>), blocks, kNchwThreads, 0, stream,
                   t);
    } else {
      FRD_LAUNCH((pdc_nchw_forward<T, kind, pure, rows, columns, false>), blocks, kNchwThreads, 0, stream, t);
    }
  }
}

}  // namespace

bool pdc_nchw_fit(const PdcProblem& p) {
  if (p.channels_last || !fits_tiles(p)) return false;
  return nchw_plan(p, false).fits() && nchw_plan(p, true).fits();
}

int pdc_nchw_parts(const PdcProblem& p) { return nchw_plan(p, true).tiles.parts; }

cudaError_t pdc_nchw_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  const PdcTiles t = nchw_plan(p, backward).tiles;
  with_case(p, [&](auto kind, auto pure, auto element) {
    using T = decltype(element);
    if (vectors_fit(p)) {
      launch<T, decltype(kind)::value, decltype(pure)::value, kPerVector<T>>(t, backward, stream);
    } else {
      launch<T, decltype(kind)::value, decltype(pure)::value, 1>(t, backward, stream);
    }
  });
  return cudaGetLastError();
}

}  // namespace frd
