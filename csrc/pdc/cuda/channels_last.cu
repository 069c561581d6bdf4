// The tiled kernels for channels_last. A block copies a tile of pixels x 128 bytes of channels into shared
// memory. Then each lane computes one word of channels, and each warp a subtile of kRows x kColumns pixels,
// fully unrolled. With few channels, 2 or 4 tiles share the 128 bytes.
#include "pdc/cuda/plan.h"
#include "pdc/cuda/window.cuh"
#include "pdc/cuda/words.cuh"

namespace frd {

// Words of a pixel in shared memory, one per lane.
constexpr int kWordsPerPixel = 32;
// Warps of a block at most. A forward has twice as many if its tile then still fits 48 KB.
constexpr int kBackwardWarps = 4;
constexpr int forward_warps(PdcKind kind) {
  return kind == PdcKind::radial ? kBackwardWarps : 2 * kBackwardWarps;
}

// Copies rows x columns pixels from (y, x) on, dy and dx apart, of image [height, width, words]; zeros
// outside. A thread copies `bytes` of each pixel from word `at` on. rows is even.
template <int bytes>
__device__ __forceinline__ void copy_pixels(uint32_t* shared, const uint32_t* image, int dy, int dx,
                                            int height, int width, int words, int at, int y, int x, int rows,
                                            int columns) {
  constexpr int kWords = bytes / 4;
  constexpr int kPerPixel = kWordsPerPixel / kWords;
  constexpr int kPerWarp = 32 / kPerPixel;
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  const int half = rows / 2;
  const int64_t line = static_cast<int64_t>(dy) * width * words;
  // A warp copies kPerWarp columns of every second row, so that few values change from row to row.
  for (int task = threadIdx.x / 32; task / 2 * kPerWarp < columns; task += warps) {
    const int column = task / 2 * kPerWarp + lane / kPerPixel;
    const int from_x = x + column * dx;
    if (column >= columns) continue;
    const bool inside = static_cast<unsigned>(from_x) < static_cast<unsigned>(width) && at < words;
    int from_y = y + task % 2 * dy;
    const uint32_t* from = image + ((static_cast<int64_t>(from_y) * width + from_x) * words + at);
    uint32_t* to = shared + (task % 2 * columns + column) * kWordsPerPixel + lane % kPerPixel * kWords;
#pragma unroll 2
    for (int r = 0; r < half; ++r) {
      copy_async<bytes>(to, from, inside && static_cast<unsigned>(from_y) < static_cast<unsigned>(height));
      from_y += 2 * dy;
      from += 2 * line;
      to += 2 * columns * kWordsPerPixel;
    }
  }
}

template <class T, int rows, int columns>
__device__ __forceinline__ void load_window(float (&x)[kPerWord<T>][rows][columns], const uint32_t* at,
                                            int pitch) {
#pragma unroll
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      float v[kPerWord<T>];
      unpack(at[r * pitch + c * kWordsPerPixel], v, T{});
#pragma unroll
      for (int i = 0; i < kPerWord<T>; ++i) x[i][r][c] = v[i];
    }
  }
}

// The weights and biases of the channels c, c + 1, ... of one word, from p.weight [C, 9] and p.bias [C] or
// null.
template <class T>
__device__ __forceinline__ void load_weights(float (&w)[kPerWord<T>][kPdcWeights], float (&bias)[kPerWord<T>],
                                             const PdcTiles& p, int c) {
#pragma unroll
  for (int v = 0; v < kPerWord<T>; ++v) {
#pragma unroll
    for (int k = 0; k < kPdcWeights; ++k)
      w[v][k] = load(static_cast<const T*>(p.weight)[(c + v) * kPdcWeights + k]);
    bias[v] = p.bias ? load(static_cast<const T*>(p.bias)[c + v]) : 0.f;
  }
}

// Computes and stores the subtile whose window starts at `at`; its outputs start at (y, x) of image [height,
// width, words]. kGated: stores their ReLU, and gates the gradients at the same places of `gated`.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns, bool kGated>
__device__ __forceinline__ void stencil_subtile(const uint32_t* at, int pitch,
                                                const float (&w)[kPerWord<T>][kPdcWeights],
                                                const float (&bias)[kPerWord<T>], float theta,
                                                uint32_t* image, uint32_t* gated, int height, int width,
                                                int words, int word, int y, int x, int dy, int dx) {
  constexpr int reach = pdc_reach(kind);
  constexpr int V = kPerWord<T>;
  float window[V][kRows + 2 * reach][kColumns + 2 * reach];
  load_window<T>(window, at, pitch);
  bool inside[kColumns];
  uint32_t* to[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    inside[j] = static_cast<unsigned>(x + j * dx) < static_cast<unsigned>(width);
    to[j] = image + (static_cast<int64_t>(y) * width + x + j * dx) * words + word;
  }
  const int64_t line = static_cast<int64_t>(dy) * width * words;
  const int64_t to_gated = kGated ? gated - image : 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r, y += dy) {
    const bool valid = static_cast<unsigned>(y) < static_cast<unsigned>(height);
    uint32_t grads[kColumns];
    if constexpr (kGated) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        grads[j] = load_written_if<uint32_t>(valid & inside[j], to[j] + to_gated);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j, to[j - 1] += line) {
      float sum[V];
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = pdc_combine<kind, pure>(bias[v], window[v], r, j, w[v], theta);
      if constexpr (kGated) {
        float grad[V];
        unpack(grads[j], grad, T{});
        pdc_gate(sum, grad);
        store_word_if(valid & inside[j], to[j] + to_gated, pack(grad, T{}));
      }
      store_word_if(valid & inside[j], to[j], pack(sum, T{}));
    }
  }
}

// Image `index` of images [B, height, width, words].
template <class Word>
__device__ __forceinline__ Word* image_at(Word* images, int index, int height, int width, int words) {
  return images + static_cast<int64_t>(index) * (height * width * words);
}

struct TilePosition {
  bool valid;
  // Position of the tile's first pixel.
  int image, y, x;
};

template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
struct ChannelsLastBlock {
  static constexpr int reach = pdc_reach(kind);
  static constexpr int V = kPerWord<T>;
  const PdcTiles& p;
  int lane, part, first_word, words, word;
  // Size of the tile with its halo, and the position of this warp's subtile in it.
  int rows, columns, sub_row, sub_column;

  __device__ __forceinline__ explicit ChannelsLastBlock(const PdcTiles& tiles) : p(tiles) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    part = p.groups.divide(blockIdx.x);
    first_word = (blockIdx.x - part * p.groups.value) << p.log_lanes;
    words = p.channels / V;
    word = word_of(lane);
    rows = p.y.subtiles * kRows + 2 * reach;
    columns = p.x.subtiles * kColumns + 2 * reach;
    sub_row = warp / p.x.subtiles * kRows;
    sub_column = warp % p.x.subtiles * kColumns;
  }

  // What word `slot` of a pixel in shared memory holds: which word of channels, of which tile of the bundle.
  __device__ __forceinline__ int word_of(int slot) const {
    return first_word + (slot & ((1 << p.log_lanes) - 1));
  }
  __device__ __forceinline__ TilePosition position_of(int slot, int bundle) const {
    const int unit = (bundle << (5 - p.log_lanes)) + (slot >> p.log_lanes);
    const PdcTile tile = tile_of(p, unit);
    return {unit < p.units, tile.image, p.y.first(tile.row, p.y.subtiles * kRows),
            p.x.first(tile.column, p.x.subtiles * kColumns)};
  }
  // The first word of each pixel that this thread copies.
  __device__ __forceinline__ int copy_slot() const { return lane * (p.copy_bytes / 4) % kWordsPerPixel; }

  // Copies the tile, whose first position is (y, x) of images [B, height, width, words], with its halo.
  __device__ __forceinline__ void copy(uint32_t* shared, const void* images, int height, int width,
                                       const TilePosition& place, int y, int x) const {
    const int dy = p.y.dilation;
    const int dx = p.x.dilation;
    const int at = word_of(copy_slot());
    const uint32_t* image = image_at(static_cast<const uint32_t*>(images), place.image, height, width, words);
    if (!place.valid) height = 0;
    y += place.y - reach * dy;
    x += place.x - reach * dx;
    if (p.copy_bytes == 16) {
      copy_pixels<16>(shared, image, dy, dx, height, width, words, at, y, x, rows, columns);
    } else if (p.copy_bytes == 8) {
      copy_pixels<8>(shared, image, dy, dx, height, width, words, at, y, x, rows, columns);
    } else {
      copy_pixels<4>(shared, image, dy, dx, height, width, words, at, y, x, rows, columns);
    }
  }

  // This lane's word at the start of the subtile's window.
  __device__ __forceinline__ const uint32_t* window(const uint32_t* shared) const {
    return shared + (sub_row * columns + sub_column) * kWordsPerPixel + lane;
  }

  // Computes this warp's outputs; the tile's first position is (y, x) of images [B, height, width, words].
  template <PdcKind of, bool kGated = false>
  __device__ __forceinline__ void stencil(const uint32_t* shared, const float (&w)[V][kPdcWeights],
                                          const float (&bias)[V], void* images, int height, int width,
                                          const TilePosition& place, int y, int x) const {
    stencil_subtile<T, of, pure, kRows, kColumns, kGated>(
        window(shared), columns * kWordsPerPixel, w, bias, p.theta,
        image_at(static_cast<uint32_t*>(images), place.image, height, width, words),
        kGated ? image_at(static_cast<uint32_t*>(p.gated), place.image, height, width, words) : nullptr,
        place.valid ? height : 0, width, words, word, place.y + y + sub_row * p.y.dilation,
        place.x + x + sub_column * p.x.dilation, p.y.dilation, p.x.dilation);
  }
};

// y = bias + sum_k w_k (x[plus_k] - theta x[minus_k]); kGated: relu(y), and the gradient p.gated gated
template <class T, PdcKind kind, bool pure, int kRows, int kColumns, bool kGated>
__global__ void __launch_bounds__(32 * forward_warps(kind), kind == PdcKind::radial && !kGated ? 3 : 2)
    pdc_channels_last_forward(PdcTiles p) {
  using Block = ChannelsLastBlock<T, kind, pure, kRows, kColumns>;
  FRD_DYNAMIC_SHARED(uint32_t, shared);
  const Block b(p);
  float w[Block::V][kPdcWeights] = {};
  float bias[Block::V] = {};
  for (int bundle = b.part; bundle < p.bundles; bundle += p.parts) {
    b.copy(shared, p.source, p.y.in_size, p.x.in_size, b.position_of(b.copy_slot(), bundle), p.y.in_begin,
           p.x.in_begin);
    if (bundle == b.part && b.word < b.words) load_weights<T>(w, bias, p, b.word * Block::V);
    wait_async();
    __syncthreads();
    if (b.word < b.words) {
      b.template stencil<kind, kGated>(shared, w, bias, p.out, p.y.out_size, p.x.out_size,
                                       b.position_of(b.lane, bundle), p.y.out_begin, p.x.out_begin);
    }
    __syncthreads();
  }
}

// sums += dy (x[plus_k] - theta x[minus_k]) over the columns [left, right) of kRows rows of a subtile, whose
// windows of x and dy start at x_at and grad_at.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__device__ __forceinline__ void correlate_rows(float (&sums)[kPerWord<T>][kPdcSums], const uint32_t* x_at,
                                               const uint32_t* grad_at, int pitch, float theta, int left,
                                               int right) {
  constexpr int reach = pdc_reach(kind);
  constexpr int V = kPerWord<T>;
  float window[V][kRows + 2 * reach][kColumns + 2 * reach], grad[V][kRows][kColumns];
  load_window<T>(window, x_at, pitch);
  load_window<T>(grad, grad_at + reach * (pitch + kWordsPerPixel), pitch);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j < left || j >= right) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) pdc_correlate<kind, pure>(sums[v], window[v], r, j, grad[v][r][j], theta);
    }
  }
}

// Of `count` positions q, q + step, ...: [begin, end) are those in [0, size).
__device__ __forceinline__ void clip(int q, int step, int size, int count, int& begin, int& end) {
  begin = 0;
  while (begin < count && q + begin * step < 0) ++begin;
  end = count;
  while (end > begin && q + (end - 1) * step >= size) --end;
}

// sums += the subtile, whose first pixel in dy is (y, x). Outputs beyond the edge of dy must be left out one
// by one, as 0 times an infinite x would be NaN; such subtiles do not share differences between rows.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__device__ __forceinline__ void correlate_subtile(float (&sums)[kPerWord<T>][kPdcSums], const uint32_t* x_at,
                                                  const uint32_t* grad_at, int pitch, const PdcTiles& p,
                                                  int y, int x) {
  int top, bottom, left, right;
  clip(y, p.y.dilation, p.y.out_size, kRows, top, bottom);
  clip(x, p.x.dilation, p.x.out_size, kColumns, left, right);
  if (bottom - top == kRows && right - left == kColumns) {
    correlate_rows<T, kind, pure, kRows, kColumns>(sums, x_at, grad_at, pitch, p.theta, 0, kColumns);
    return;
  }
#pragma unroll 1
  for (int r = top; r < bottom; ++r) {
    correlate_rows<T, kind, pure, 1, kColumns>(sums, x_at + r * pitch, grad_at + r * pitch, pitch, p.theta,
                                               left, right);
  }
}

// Adds the sums of the block's warps, and within a warp those of its tiles, in a fixed order into `part` [10,
// C].
template <int V>
__device__ __forceinline__ void reduce_tiles(float* shared, const float (&sums)[V][kPdcSums], float* part,
                                             int channels, int first_channel, int log_lanes) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int width = V << log_lanes;
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) shared[((warp * kPdcSums + k) * 32 + lane) * V + v] = sums[v][k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPdcSums * width; i += blockDim.x) {
    const int k = i / width;
    const int c = i - k * width;
    float sum = 0.f;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
      for (int at = c; at < 32 * V; at += width) sum += shared[(w * kPdcSums + k) * 32 * V + at];
    }
    if (first_channel + c < channels) part[static_cast<int64_t>(k) * channels + first_channel + c] = sum;
  }
}

// dx, the same stencil over dy, and dw_k = sum dy (x[plus_k] - theta x[minus_k]), db = sum dy.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(32 * kBackwardWarps, 4) pdc_channels_last_backward(PdcTiles p) {
  using Block = ChannelsLastBlock<T, kind, pure, kRows, kColumns>;
  constexpr int V = Block::V;
  FRD_DYNAMIC_SHARED(uint32_t, shared);
  const Block b(p);
  uint32_t* grads = shared;
  uint32_t* pixels = shared + b.rows * b.columns * kWordsPerPixel;
  const float no_bias[V] = {};
  float w[V][kPdcWeights] = {};
  float sums[V][kPdcSums] = {};
  for (int bundle = b.part; bundle < p.bundles; bundle += p.parts) {
    const TilePosition source = b.position_of(b.copy_slot(), bundle);
    b.copy(grads, p.grad, p.y.out_size, p.x.out_size, source, p.y.out_begin, p.x.out_begin);
    if (p.sums) b.copy(pixels, p.source, p.y.in_size, p.x.in_size, source, p.y.in_begin, p.x.in_begin);
    if (bundle == b.part && b.word < b.words && p.out) {
      float ignored[V];
      load_weights<T>(w, ignored, p, b.word * V);
#pragma unroll
      for (int v = 0; v < V; ++v) pdc_input_grad_weights<kind>(w[v], p.theta);
    }
    wait_async();
    __syncthreads();
    const TilePosition place = b.position_of(b.lane, bundle);
    if (b.word < b.words && p.out) {
      b.template stencil<input_grad_kind(kind)>(grads, w, no_bias, p.out, p.y.in_size, p.x.in_size, place,
                                                p.y.in_begin, p.x.in_begin);
    }
    if (b.word < b.words && p.sums && place.valid) {
      correlate_subtile<T, kind, pure, kRows, kColumns>(
          sums, b.window(pixels), b.window(grads), b.columns * kWordsPerPixel, p,
          place.y + p.y.out_begin + b.sub_row * p.y.dilation,
          place.x + p.x.out_begin + b.sub_column * p.x.dilation);
    }
    __syncthreads();
  }
  if (p.sums) {
    reduce_tiles<V>(reinterpret_cast<float*>(shared), sums,
                    p.sums + static_cast<int64_t>(b.part) * kPdcSums * p.channels, p.channels,
                    b.first_word * V, p.log_lanes);
  }
}

namespace {

// A warp computes 8 x 4 outputs. Their 60 words are converted once, and the angular kind takes 3.3
// subtractions per output instead of 8; a larger window would leave registers for fewer than 16 warps. The
// radial kind reaches twice as far: with 2 columns the two windows of its backward fit the 48 KB that a block
// has by default.
constexpr int kRows = 8;
constexpr int columns_of(PdcKind kind, bool backward) { return kind == PdcKind::radial && backward ? 2 : 4; }

// The width, as a power of two, that leaves the fewest lanes without a channel; of those the widest.
int log_lanes_for(int64_t words) {
  int best = 5;
  for (int log = 4; log >= 3; --log) {
    if (ceil_divide(words, 1 << log) << log < ceil_divide(words, 1 << best) << best) best = log;
  }
  return best;
}

// Small problems get fewer warps per block, and so more blocks. Returns the number of tiles per image.
int64_t set_subtiles(PdcTiles& t, const PdcProblem& p, const Frame& fy, const Frame& fx, bool backward) {
  const int columns = columns_of(p.kind, backward);
  const int64_t lines = ceil_divide(fy.size, p.y.dilation);
  const int64_t pixels = ceil_divide(fx.size, p.x.dilation);
  const int warps = backward ? kBackwardWarps : forward_warps(p.kind);
  t.y.subtiles = static_cast<int>(std::min<int64_t>(warps / kBackwardWarps, ceil_divide(lines, kRows)));
  t.x.subtiles = static_cast<int>(std::min<int64_t>(kBackwardWarps, ceil_divide(pixels, columns)));
  for (;;) {
    t.y.per_phase = Divisor(ceil_divide(lines, t.y.subtiles * kRows));
    t.x.per_phase = Divisor(ceil_divide(pixels, t.x.subtiles * columns));
    const int64_t rows = t.y.per_phase.value * phases_of(p.y, fy);
    const int64_t per_row = t.x.per_phase.value * phases_of(p.x, fx);
    const int64_t blocks = (p.batch * rows * per_row * t.groups.value) >> (5 - t.log_lanes);
    if (blocks >= kMultiprocessors || t.y.subtiles * t.x.subtiles == 1) {
      t.per_row = Divisor(per_row);
      t.per_image = Divisor(rows * per_row);
      return rows * per_row;
    }
    int& larger = t.y.subtiles > 1 ? t.y.subtiles : t.x.subtiles;
    larger = (larger + 1) / 2;
  }
}

Plan channels_last_plan(const PdcProblem& p, bool backward) {
  PdcTiles t{};
  set_pointers(t, p);
  const Frame fy = frame_of(p.y, p.kind, backward);
  const Frame fx = frame_of(p.x, p.kind, backward);
  t.y = tile_axis(p.y, fy);
  t.x = tile_axis(p.x, fx);
  const int element = p.dtype == DType::f32 ? 4 : 2;
  const int64_t words = p.channels * element / 4;
  t.log_lanes = log_lanes_for(words);
  t.groups = Divisor(ceil_divide(words, 1 << t.log_lanes));
  t.copy_bytes = 16;
  while (t.copy_bytes > 4 && (p.channels * element % t.copy_bytes != 0 || !all_aligned(p, t.copy_bytes)))
    t.copy_bytes /= 2;
  const int64_t units = p.batch * set_subtiles(t, p, fy, fx, backward);
  const int64_t groups = t.groups.value;
  const int64_t bundles = ceil_divide(units, 32 >> t.log_lanes);
  t.units = static_cast<int>(units);
  t.bundles = static_cast<int>(bundles);
  // A block of the forward reuses the weights it has loaded for up to four tiles.
  const int64_t wanted = backward ? std::min<int64_t>(kMaxParts, kTargetBlocks / groups)
                                  : std::max<int64_t>(bundles / 4, 2 * kTargetBlocks / groups);
  t.parts = balanced_parts(bundles, wanted);
  return {t, units * groups};
}

size_t shared_bytes(const PdcTiles& t, PdcKind kind, bool backward) {
  const int halo = 2 * pdc_reach(kind);
  const int rows = t.y.subtiles * kRows + halo;
  const int columns = t.x.subtiles * columns_of(kind, backward) + halo;
  return static_cast<size_t>(rows) * columns * kWordsPerPixel * 4 * (backward ? 2 : 1);
}

}  // namespace

bool pdc_channels_last_fit(const PdcProblem& p) {
  if (!p.channels_last || !fits_tiles(p)) return false;
  const bool words = p.dtype == DType::f32 || p.channels % 2 == 0;
  return words && all_aligned(p, 4) && channels_last_plan(p, false).fits() &&
         channels_last_plan(p, true).fits();
}

int pdc_channels_last_parts(const PdcProblem& p) { return channels_last_plan(p, true).tiles.parts; }

cudaError_t pdc_channels_last_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  const PdcTiles t = channels_last_plan(p, backward).tiles;
  const unsigned blocks = static_cast<unsigned>(t.parts) * t.groups.value;
  const unsigned threads = 32u * t.y.subtiles * t.x.subtiles;
  const size_t bytes = shared_bytes(t, p.kind, backward);
  with_case(p, [&](auto kind, auto pure, auto element) {
    constexpr PdcKind k = decltype(kind)::value;
    constexpr bool is_pure = decltype(pure)::value;
    using T = decltype(element);
    if (backward) {
      FRD_LAUNCH((pdc_channels_last_backward<T, k, is_pure, kRows, columns_of(k, true)>), blocks, threads,
                 bytes, stream, t);
    } else if (p.gated) {
      if constexpr (is_pure)
        FRD_LAUNCH((pdc_channels_last_forward<T, k, true, kRows, columns_of(k, false), true>), blocks,
                   threads, bytes, stream, t);
    } else {
      FRD_LAUNCH((pdc_channels_last_forward<T, k, is_pure, kRows, columns_of(k, false), false>), blocks,
                 threads, bytes, stream, t);
    }
  });
  return cudaGetLastError();
}

}  // namespace frd
