// channels_last: a block copies a tile of pixels x 128 bytes of channels into shared memory; then a lane owns
// one word of channels and a warp a subtile of kRows x kColumns pixels, all of it unrolled. Where there are
// few channels, 2 or 4 tiles share the 128 bytes.
#pragma once
#include "pdc/cuda/args.h"
#include "pdc/cuda/window.cuh"
#include "pdc/cuda/words.cuh"

namespace frd {

constexpr int kPixelWords = 32;  // of a pixel in shared memory: one for each lane
constexpr int kPixelWarps = 4;   // at most; twice as many in a forward whose tile then fits 48 KB
constexpr int pixel_warps(PdcKind kind) { return kind == PdcKind::radial ? kPixelWarps : 2 * kPixelWarps; }

// rows x columns pixels from (y, x) on, a dilation apart; zeros outside. A thread copies from word `at` of
// each. rows is even. image: [height, width, words]
template <int bytes>
__device__ __forceinline__ void copy_pixels(uint32_t* shared, const uint32_t* image, int dy, int dx,
                                            int height, int width, int words, int at, int y, int x, int rows,
                                            int columns) {
  constexpr int kWords = bytes / 4, kPerPixel = kPixelWords / kWords, kPerWarp = 32 / kPerPixel;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, half = rows / 2;
  const int64_t line = static_cast<int64_t>(dy) * width * words;
  // A warp has kPerWarp columns and every second row: few values change from row to row.
  for (int task = threadIdx.x / 32; task / 2 * kPerWarp < columns; task += warps) {
    const int column = task / 2 * kPerWarp + lane / kPerPixel, from_x = x + column * dx;
    if (column >= columns) continue;
    const bool inside = static_cast<unsigned>(from_x) < static_cast<unsigned>(width) && at < words;
    int from_y = y + task % 2 * dy;
    const uint32_t* from = image + ((static_cast<int64_t>(from_y) * width + from_x) * words + at);
    uint32_t* to = shared + (task % 2 * columns + column) * kPixelWords + lane % kPerPixel * kWords;
#pragma unroll 2
    for (int r = 0; r < half; ++r) {
      copy_async<bytes>(to, from, inside && static_cast<unsigned>(from_y) < static_cast<unsigned>(height));
      from_y += 2 * dy;
      from += 2 * line;
      to += 2 * columns * kPixelWords;
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
      unpack(at[r * pitch + c * kPixelWords], v, T{});
#pragma unroll
      for (int i = 0; i < kPerWord<T>; ++i) x[i][r][c] = v[i];
    }
  }
}

// w: [C, 9], bias: [C] or null
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

// Stencil of the subtile whose window starts at `at`; its outputs start at (y, x) of image [height, width,
// words].
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__device__ __forceinline__ void stencil_subtile(const uint32_t* at, int pitch,
                                                const float (&w)[kPerWord<T>][kPdcWeights],
                                                const float (&bias)[kPerWord<T>], float theta,
                                                uint32_t* image, int height, int width, int words, int word,
                                                int y, int x, int dy, int dx) {
  constexpr int reach = pdc_reach(kind), V = kPerWord<T>;
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
#pragma unroll
  for (int r = 0; r < kRows; ++r, y += dy) {
    const bool valid = static_cast<unsigned>(y) < static_cast<unsigned>(height);
#pragma unroll
    for (int j = 0; j < kColumns; ++j, to[j - 1] += line) {
      float sum[V];
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = pdc_combine<kind, pure>(bias[v], window[v], r, j, w[v], theta);
      store_word_if(valid & inside[j], to[j], pack(sum, T{}));
    }
  }
}

// The image `index` of a tensor [B, height, width, words].
template <class Word>
__device__ __forceinline__ Word* image_at(Word* images, int index, int height, int width, int words) {
  return images + static_cast<int64_t>(index) * (height * width * words);
}

struct PixelPlace {
  bool valid;
  int image, y, x;  // position of the tile's first pixel
};

template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
struct PixelBlock {
  static constexpr int reach = pdc_reach(kind), V = kPerWord<T>;
  const PdcTiles& p;
  int lane, part, first_word, words, word;
  int rows, columns, sub_row, sub_column;  // of the tile with its halo; of the subtile in the tile

  __device__ __forceinline__ explicit PixelBlock(const PdcTiles& tiles) : p(tiles) {
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

  // What stands in word `slot` of a pixel in shared memory: its word of channels, its tile of a bundle.
  __device__ __forceinline__ int word_of(int slot) const {
    return first_word + (slot & ((1 << p.log_lanes) - 1));
  }
  __device__ __forceinline__ PixelPlace place_of(int slot, int bundle) const {
    const int unit = (bundle << (5 - p.log_lanes)) + (slot >> p.log_lanes);
    const PdcTile tile = tile_of(p, unit);
    return {unit < p.units, tile.image, p.y.first(tile.row, p.y.subtiles * kRows),
            p.x.first(tile.column, p.x.subtiles * kColumns)};
  }
  // The first word that this thread copies of each pixel.
  __device__ __forceinline__ int copy_slot() const { return lane * (p.copy_bytes / 4) % kPixelWords; }

  // The windows of the tile whose centre pixels start at (y, x) of images [B, height, width, words].
  __device__ __forceinline__ void copy(uint32_t* shared, const void* images, int height, int width,
                                       const PixelPlace& place, int y, int x) const {
    const int dy = p.y.dilation, dx = p.x.dilation, at = word_of(copy_slot());
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

  // This lane's first word of the subtile's window.
  __device__ __forceinline__ const uint32_t* window(const uint32_t* shared) const {
    return shared + (sub_row * columns + sub_column) * kPixelWords + lane;
  }

  // Outputs of the tile, whose first position is (y, x) of images [B, height, width, words].
  template <PdcKind of>
  __device__ __forceinline__ void stencil(const uint32_t* shared, const float (&w)[V][kPdcWeights],
                                          const float (&bias)[V], void* images, int height, int width,
                                          const PixelPlace& place, int y, int x) const {
    stencil_subtile<T, of, pure, kRows, kColumns>(
        window(shared), columns * kPixelWords, w, bias, p.theta,
        image_at(static_cast<uint32_t*>(images), place.image, height, width, words), place.valid ? height : 0,
        width, words, word, place.y + y + sub_row * p.y.dilation, place.x + x + sub_column * p.x.dilation,
        p.y.dilation, p.x.dilation);
  }
};

template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(32 * pixel_warps(kind), kind == PdcKind::radial ? 3 : 2)
    pdc_pixels_forward(PdcTiles p) {
  using Block = PixelBlock<T, kind, pure, kRows, kColumns>;
  FRD_DYNAMIC_SHARED(uint32_t, shared);
  const Block b(p);
  float w[Block::V][kPdcWeights] = {}, bias[Block::V] = {};
  for (int bundle = b.part; bundle < p.bundles; bundle += p.parts) {
    b.copy(shared, p.source, p.y.x_size, p.x.x_size, b.place_of(b.copy_slot(), bundle), p.y.x_first,
           p.x.x_first);
    if (bundle == b.part && b.word < b.words) load_weights<T>(w, bias, p, b.word * Block::V);
    wait_async();
    __syncthreads();
    if (b.word < b.words) {
      b.template stencil<kind>(shared, w, bias, p.out, p.y.q_size, p.x.q_size, b.place_of(b.lane, bundle),
                               p.y.q_first, p.x.q_first);
    }
    __syncthreads();
  }
}

// sums += of columns [left, right) of kRows rows of a subtile whose windows of x and dy start at x_at and
// g_at.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__device__ __forceinline__ void correlate_rows(float (&sums)[kPerWord<T>][kPdcSums], const uint32_t* x_at,
                                               const uint32_t* g_at, int pitch, float theta, int left,
                                               int right) {
  constexpr int reach = pdc_reach(kind), V = kPerWord<T>;
  float window[V][kRows + 2 * reach][kColumns + 2 * reach], g[V][kRows][kColumns];
  load_window<T>(window, x_at, pitch);
  load_window<T>(g, g_at + reach * (pitch + kPixelWords), pitch);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j < left || j >= right) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) pdc_correlate<kind, pure>(sums[v], window[v], r, j, g[v][r][j], theta);
    }
  }
}

// The first of `count` positions from q on, `step` apart, that is not negative, and the first that is not
// below size.
__device__ __forceinline__ void clip(int q, int step, int size, int count, int& begin, int& end) {
  begin = 0;
  while (begin < count && q + begin * step < 0) ++begin;
  end = count;
  while (end > begin && q + (end - 1) * step >= size) --end;
}

// sums += of the subtile; (y, x) is its first pixel in dy. Where it hangs over the edge of dy the outputs
// have to be left out one by one, as 0 times an infinite x would be NaN, and then they do not share their
// differences.
template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__device__ __forceinline__ void correlate_subtile(float (&sums)[kPerWord<T>][kPdcSums], const uint32_t* x_at,
                                                  const uint32_t* g_at, int pitch, const PdcTiles& p, int y,
                                                  int x) {
  int top, bottom, left, right;
  clip(y, p.y.dilation, p.y.q_size, kRows, top, bottom);
  clip(x, p.x.dilation, p.x.q_size, kColumns, left, right);
  if (bottom - top == kRows && right - left == kColumns) {
    correlate_rows<T, kind, pure, kRows, kColumns>(sums, x_at, g_at, pitch, p.theta, 0, kColumns);
    return;
  }
#pragma unroll 1
  for (int r = top; r < bottom; ++r) {
    correlate_rows<T, kind, pure, 1, kColumns>(sums, x_at + r * pitch, g_at + r * pitch, pitch, p.theta, left,
                                               right);
  }
}

// Adds the sums of the block's tiles: warp after warp, in a warp tile after tile; part [10, C] is the block's
// own.
template <int V>
__device__ __forceinline__ void add_tiles(float* shared, const float (&sums)[V][kPdcSums], float* part,
                                          int channels, int first_channel, int log_lanes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = V << log_lanes;
#pragma unroll
  for (int k = 0; k < kPdcSums; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) shared[((warp * kPdcSums + k) * 32 + lane) * V + v] = sums[v][k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPdcSums * width; i += blockDim.x) {
    const int k = i / width, c = i - k * width;
    float sum = 0.f;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
      for (int at = c; at < 32 * V; at += width) sum += shared[(w * kPdcSums + k) * 32 * V + at];
    }
    if (first_channel + c < channels) part[static_cast<int64_t>(k) * channels + first_channel + c] = sum;
  }
}

template <class T, PdcKind kind, bool pure, int kRows, int kColumns>
__global__ void __launch_bounds__(32 * kPixelWarps, 4) pdc_pixels_backward(PdcTiles p) {
  using Block = PixelBlock<T, kind, pure, kRows, kColumns>;
  constexpr int V = Block::V;
  FRD_DYNAMIC_SHARED(uint32_t, shared);
  const Block b(p);
  uint32_t *grads = shared, *pixels = shared + b.rows * b.columns * kPixelWords;
  const float none[V] = {};
  float w[V][kPdcWeights] = {}, sums[V][kPdcSums] = {};
  for (int bundle = b.part; bundle < p.bundles; bundle += p.parts) {
    const PixelPlace source = b.place_of(b.copy_slot(), bundle);
    b.copy(grads, p.grad, p.y.q_size, p.x.q_size, source, p.y.q_first, p.x.q_first);
    if (p.sums) b.copy(pixels, p.source, p.y.x_size, p.x.x_size, source, p.y.x_first, p.x.x_first);
    if (bundle == b.part && b.word < b.words && p.out) {
      float ignored[V];
      load_weights<T>(w, ignored, p, b.word * V);
#pragma unroll
      for (int v = 0; v < V; ++v) pdc_turn<kind>(w[v], p.theta);
    }
    wait_async();
    __syncthreads();
    const PixelPlace place = b.place_of(b.lane, bundle);
    if (b.word < b.words && p.out) {
      b.template stencil<turned_kind(kind)>(grads, w, none, p.out, p.y.x_size, p.x.x_size, place, p.y.x_first,
                                            p.x.x_first);
    }
    if (b.word < b.words && p.sums && place.valid) {
      correlate_subtile<T, kind, pure, kRows, kColumns>(sums, b.window(pixels), b.window(grads),
                                                        b.columns * kPixelWords, p,
                                                        place.y + p.y.q_first + b.sub_row * p.y.dilation,
                                                        place.x + p.x.q_first + b.sub_column * p.x.dilation);
    }
    __syncthreads();
  }
  if (p.sums) {
    add_tiles<V>(reinterpret_cast<float*>(shared), sums,
                 p.sums + static_cast<int64_t>(b.part) * kPdcSums * p.channels, p.channels, b.first_word * V,
                 p.log_lanes);
  }
}

}  // namespace frd
