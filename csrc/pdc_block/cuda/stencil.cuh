// Computes a tile of hidden values [pixels, kSlab], the operand of the product, from a stage of the input.
#pragma once
#include "pdc_block/cuda/shape.cuh"

namespace frd {

// A difference of two taps, the first of which comes earlier in the image, so that two outputs that need it
// with opposite signs share one subtraction.
struct TapDifference {
  Tap first, second;
  bool flipped;
};
FRD_HD constexpr TapDifference difference_of(PdcKind kind, int k) {
  const Tap plus = plus_tap(kind, k);
  const Tap minus = minus_tap(kind, k);
  const bool before = plus.dy < minus.dy || (plus.dy == minus.dy && plus.dx < minus.dx);
  return before ? TapDifference{plus, minus, false} : TapDifference{minus, plus, true};
}

// sum += sum_k w_k (x[plus_k] - x[minus_k]), theta 1, with at(Tap, channel) reading x.
template <PdcKind kind, int k, int kChannels, class At>
FRD_DEVICE void add_differences(float (&sum)[kChannels], const float (&weight)[kPdcWeights][kChannels],
                                const At& at) {
  if constexpr (k < kPdcWeights) {
    constexpr TapDifference d = difference_of(kind, k);
    constexpr Tap plus = plus_tap(kind, k);
    constexpr bool unused = d.first.dy == d.second.dy && d.first.dx == d.second.dx;
#pragma unroll
    for (int v = 0; v < kChannels; ++v) {
      if constexpr (kind == PdcKind::vanilla) {
        sum[v] += weight[k][v] * at(plus, v);
      } else if constexpr (!unused) {
        const float difference = at(d.first, v) - at(d.second, v);
        if constexpr (d.flipped)
          sum[v] -= weight[k][v] * difference;
        else
          sum[v] += weight[k][v] * difference;
      }
    }
    add_differences<kind, k + 1>(sum, weight, at);
  }
}

template <class T>
FRD_DEVICE void unpack_word(uint32_t word, float (&v)[2]) {
  unpack<T>(word, v[0], v[1]);
}
template <class T>
FRD_DEVICE void unpack_word(uint32_t word, float (&v)[1]) {
  memcpy(v, &word, 4);
}

FRD_DEVICE uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// The two pixels, column and column + 1, that a lane computes in each row of a strip.
template <class S>
struct StripPosition {
  // Of the slab: a word of channels, or if kPaired a channel.
  int unit;
  // Of the tile.
  int column, row;
};

template <class S>
FRD_DEVICE void store_hidden(uint32_t* hidden, const StripPosition<S>& at, int row, uint32_t left,
                             uint32_t right) {
  const int pixel = (at.row + row) * S::Tile::kColumns + at.column;
  hidden[pixel * 32 + swizzled<typename S::T>(pixel, at.unit >> 2) * 4 + (at.unit & 3)] = left;
  hidden[(pixel + 1) * 32 + swizzled<typename S::T>(pixel + 1, at.unit >> 2) * 4 + (at.unit & 3)] = right;
}
// The same for one 16-bit channel; `both` has the left pixel in its low half.
template <class S>
FRD_DEVICE void store_hidden_pair(uint32_t* hidden, const StripPosition<S>& at, int channel, int row,
                                  uint32_t both) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(hidden);
  const int pixel = (at.row + row) * S::Tile::kColumns + at.column;
  halves[pixel * 64 + swizzled<typename S::T>(pixel, channel >> 3) * 8 + (channel & 7)] =
      static_cast<uint16_t>(both);
  halves[(pixel + 1) * 64 + swizzled<typename S::T>(pixel + 1, channel >> 3) * 8 + (channel & 7)] =
      static_cast<uint16_t>(both >> 16);
}

// Loads one row of a strip's window: kChannels of a word of channels, from its half `half` on.
template <class S, int kReach, int kChannels>
FRD_DEVICE void window_row(const uint32_t* corner, int row, int half,
                           float (&to)[2 + 2 * kReach][kChannels]) {
  using T = typename S::T;
  const uint32_t* from = corner + row * S::halo_columns(kReach) * S::kPitch;
  if constexpr (S::kPaired) {
    float pixels[6];
#pragma unroll
    for (int i = 0; i < 3; ++i) unpack<T>(from[i * S::kPitch], pixels[2 * i], pixels[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 2 + 2 * kReach; ++i) to[i][0] = pixels[2 - kReach + i];
  } else {
#pragma unroll
    for (int i = 0; i < 2 + 2 * kReach; ++i) {
      if constexpr (kChannels == S::kUnit)
        unpack_word<T>(from[i * S::kPitch], to[i]);
      else
        to[i][0] = load(reinterpret_cast<const T*>(from + i * S::kPitch)[half]);
    }
  }
}

// Loads weights and bias of kChannels channels from `channel` of the slab on.
template <class S, int kChannels>
FRD_DEVICE void load_weights(const uint32_t* weights, int channel, float (&w)[kPdcWeights][kChannels],
                             float (&bias)[kChannels]) {
  using T = typename S::T;
  if constexpr (kChannels == 2) {
    float flat[2 * kPdcWeights];
#pragma unroll
    for (int i = 0; i < kPdcWeights; ++i)
      unpack<T>(weights[channel / 2 * kPdcWeights + i], flat[2 * i], flat[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 2 * kPdcWeights; ++i) w[i % kPdcWeights][i / kPdcWeights] = flat[i];
    unpack<T>(weights[S::kStencilWords + channel / 2], bias[0], bias[1]);
  } else {
    const T* from = reinterpret_cast<const T*>(weights);
#pragma unroll
    for (int k = 0; k < kPdcWeights; ++k) w[k][0] = load(from[channel * kPdcWeights + k]);
    bias[0] = load(from[S::kSlab * kPdcWeights + channel]);
  }
}

// Calls store_row(row, sums of its two pixels) for every row of a strip.
template <class S, PdcKind kind, int kChannels, class StoreRow>
FRD_DEVICE void strip_sums(const uint32_t* halo, const uint32_t* weights, const StripPosition<S>& at,
                           int half, const StoreRow& store_row) {
  constexpr int reach = kernel_side(kind) / 2;
  constexpr int columns = S::halo_columns(reach);
  float weight[kPdcWeights][kChannels], bias[kChannels];
  load_weights<S>(weights, at.unit * S::kStripChannels + half, weight, bias);
  const uint32_t* corner =
      halo + (at.row * columns + (S::kPaired ? at.column / 2 : at.column)) * S::kPitch + at.unit;
  float window[S::kStripRows + 2 * reach][2 + 2 * reach][kChannels];
#pragma unroll
  for (int r = 0; r < 2 * reach; ++r) window_row<S, reach>(corner, r, half, window[r]);
#pragma unroll
  for (int r = 0; r < S::kStripRows; ++r) {
    window_row<S, reach>(corner, r + 2 * reach, half, window[r + 2 * reach]);
    float sum[2][kChannels];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int v = 0; v < kChannels; ++v) sum[i][v] = bias[v];
      add_differences<kind, 0>(sum[i], weight,
                               [&](Tap t, int v) { return window[r + reach + t.dy][i + reach + t.dx][v]; });
    }
    store_row(r, sum);
  }
}

template <class S, PdcKind kind>
FRD_DEVICE void stencil_strip(const uint32_t* halo, const uint32_t* weights, const StripPosition<S>& at,
                              uint32_t* hidden) {
  using T = typename S::T;
  if constexpr (S::kUnit == 1) {
    strip_sums<S, kind, 1>(halo, weights, at, 0, [&](int r, const float (&sum)[2][1]) {
      store_hidden<S>(hidden, at, r, float_bits(relu(sum[0][0])), float_bits(relu(sum[1][0])));
    });
  } else if constexpr (S::kPaired || kind == PdcKind::radial) {
    // Radial's window of five rows of two channels would not fit the registers beside the product's sums.
#pragma unroll 1
    for (int half = 0; half < S::kStripChannels; ++half)
      strip_sums<S, kind, 1>(halo, weights, at, half, [&](int r, const float (&sum)[2][1]) {
        store_hidden_pair<S>(hidden, at, at.unit * S::kStripChannels + half, r,
                             pack_relu<T>(sum[0][0], sum[1][0]));
      });
  } else {
    strip_sums<S, kind, 2>(halo, weights, at, 0, [&](int r, const float (&sum)[2][2]) {
      store_hidden<S>(hidden, at, r, pack_relu<T>(sum[0][0], sum[0][1]), pack_relu<T>(sum[1][0], sum[1][1]));
    });
  }
}

template <class S>
FRD_DEVICE void copy_strip(const uint32_t* halo, const StripPosition<S>& at, uint32_t* hidden) {
  constexpr int columns = S::halo_columns(0);
#pragma unroll
  for (int r = 0; r < S::kStripRows; ++r) {
    const uint32_t* from = halo + (at.row + r) * columns * S::kPitch + at.unit;
    if constexpr (S::kPaired)
      store_hidden_pair<S>(hidden, at, at.unit, r, from[at.column / 2 * S::kPitch]);
    else
      store_hidden<S>(hidden, at, r, from[at.column * S::kPitch], from[(at.column + 1) * S::kPitch]);
  }
}

// sum + sum_k w_k (x[plus_k] - theta x[minus_k]) for any stride, dilation and theta, every tap from global
// memory.
template <class S>
FRD_DEVICE float gather_value(const BlockProduct& a, const typename S::T* image, int y, int x, int c,
                              const typename S::T* weight, float sum) {
  const int pixel = S::kChannelsLast ? a.channels : 1;
  const typename S::T* channel = image + c * (S::kChannelsLast ? 1 : a.height * a.width);
  const auto at = [&](Tap t) {
    const int row = y + t.dy * a.dilation_y;
    const int column = x + t.dx * a.dilation_x;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(a.height) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(a.width);
    return inside ? load(channel[(row * a.width + column) * pixel]) : 0.f;
  };
#pragma unroll
  for (int k = 0; k < kPdcWeights; ++k) {
    const Tap plus = plus_tap(a.kind, k);
    const Tap minus = minus_tap(a.kind, k);
    if (a.kind == PdcKind::vanilla)
      sum += load(weight[k]) * at(plus);
    else if (!a.pure || plus.dy != minus.dy || plus.dx != minus.dx)
      sum += load(weight[k]) * (at(plus) - (a.pure ? 1.f : a.theta) * at(minus));
  }
  return sum;
}

template <class S>
FRD_DEVICE void gather_hidden(const BlockProduct& a, const TilePosition& position, int c0,
                              const uint32_t* weights, uint32_t* hidden) {
  using T = typename S::T;
  const T* image = static_cast<const T*>(a.x) + position.image * a.height * a.width * a.channels;
  const T* weight = reinterpret_cast<const T*>(weights);
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kPixelCount * S::kSlab; i += S::kThreads) {
    const int pixel = S::kChannelsLast ? i / S::kSlab : i % S::kPixelCount;
    const int c = S::kChannelsLast ? i % S::kSlab : i / S::kPixelCount;
    const int y = position.y + pixel / S::Tile::kColumns;
    const int x = position.x + pixel % S::Tile::kColumns;
    float sum = 0;
    if (y < a.out_height && x < a.out_width && c0 + c < a.channels)
      sum = gather_value<S>(a, image, y * a.stride_y, x * a.stride_x, c0 + c, weight + c * kPdcWeights,
                            load(weight[S::kSlab * kPdcWeights + c]));
    constexpr int group = 16 / static_cast<int>(sizeof(T));
    store(reinterpret_cast<T*>(hidden)[pixel * S::kSlab + swizzled<T>(pixel, c / group) * group + c % group],
          relu(sum));
  }
}

// The stencil weights and biases of a stage.
template <class S>
FRD_DEVICE const uint32_t* stencil_of(const BlockProduct& a, const uint32_t* stage) {
  return stage + a.stage_words - 32 - S::kStencilWords;
}

// Computes the hidden values of strip `strip` of kStrips of one slab, with its stencil weights.
template <class S>
FRD_DEVICE void make_strip(Prologue prologue, const uint32_t* stage, const uint32_t* weights, int strip,
                           uint32_t* hidden) {
  const int lane = threadIdx.x % 32;
  const int column = strip % S::kStripsX;
  const int rest = strip / S::kStripsX;
  const StripPosition<S> at{rest / S::kStripsY * 32 + lane, column * 2, rest % S::kStripsY * S::kStripRows};
  switch (prologue) {
    case Prologue::vanilla:
      return stencil_strip<S, PdcKind::vanilla>(stage, weights, at, hidden);
    case Prologue::central:
      return stencil_strip<S, PdcKind::central>(stage, weights, at, hidden);
    case Prologue::angular:
      return stencil_strip<S, PdcKind::angular>(stage, weights, at, hidden);
    case Prologue::radial:
      return stencil_strip<S, PdcKind::radial>(stage, weights, at, hidden);
    default:
      return copy_strip<S>(stage, at, hidden);
  }
}

// Computes the tile of hidden values of one slab.
template <class S>
FRD_DEVICE void make_hidden(const BlockProduct& a, const TilePosition& position, int slab,
                            const uint32_t* stage, uint32_t* hidden) {
  static_assert(S::kStrips % S::Tile::kWarps == 0, "every warp takes the same number of strips");
  const int warp = threadIdx.x / 32;
  const uint32_t* weights = stencil_of<S>(a, stage);
  if (a.prologue == Prologue::gather) return gather_hidden<S>(a, position, slab * S::kSlab, weights, hidden);
#pragma unroll
  for (int i = 0; i < S::kStrips; i += S::Tile::kWarps)
    make_strip<S>(a.prologue, stage, weights, i + warp, hidden);
}

}  // namespace frd
