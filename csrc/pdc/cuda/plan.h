// From the problem to the tiles: what the launchers of the two tiled families share.
#pragma once
#include <algorithm>

#include "pdc/cuda/args.h"
#include "pdc/cuda/launch.h"
#include "pdc/taps.h"

namespace frd {

constexpr int kMostParts = 512;   // of dw: each costs 40 bytes per channel to write and to read
constexpr int kProcessors = 132;  // of an H100; a fixed number, so that the sums do not depend on the card
constexpr int kBlocksWanted = 8 * kProcessors;

inline int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline bool all_aligned(const PdcProblem& p, int bytes) {
  return aligned(p.source, bytes) && aligned(p.grad, bytes) && aligned(p.out, bytes);
}

// The tiled kernels count positions in 32 bits; nothing near these limits is a picture.
inline bool fits_tiles(const PdcAxis& a) {
  constexpr int64_t kMost = 1 << 24;
  return a.step == 1 && a.dilation <= kMost && a.lead <= kMost && a.lead >= -kMost && a.out <= kMost &&
         a.source <= kMost && a.dilation * 64 <= kMost;
}

struct Frame {
  int64_t x_first, q_first, size;
};

// The positions that have an output, or in the backward a pixel of x or of dy.
inline Frame frame_of(const PdcAxis& a, PdcKind kind, bool backward) {
  const int64_t excess = a.lead - kernel_side(kind) / 2 * a.dilation;
  if (!backward || excess >= 0) return {-excess, 0, a.out};
  return {0, excess, a.source};
}

inline PdcTileAxis tile_axis(const PdcAxis& a, const Frame& frame) {
  PdcTileAxis t{};
  t.x_first = static_cast<int>(frame.x_first), t.q_first = static_cast<int>(frame.q_first);
  t.x_size = static_cast<int>(a.source), t.q_size = static_cast<int>(a.out),
  t.dilation = static_cast<int>(a.dilation);
  t.subtiles = 1;
  return t;
}

// Phases of the axis that hold a position.
inline int64_t phases_of(const PdcAxis& a, const Frame& frame) { return std::min(a.dilation, frame.size); }

// Units and blocks are counted in 32 bits as well.
struct Plan {
  PdcTiles tiles;
  int64_t units;
  bool fits() const { return units < (int64_t{1} << 31) - kMostThreads; }
  static constexpr int kMostThreads = 1024;
};

// Parts of `units` that leave each part the same number of them or one less.
inline int balanced_parts(int64_t units, int64_t wanted) {
  const int64_t parts = std::clamp<int64_t>(wanted, 1, units);
  return static_cast<int>(ceil_divide(units, ceil_divide(units, parts)));
}

inline void set_pointers(PdcTiles& t, const PdcProblem& p) {
  t.theta = static_cast<float>(p.theta);
  t.source = p.source, t.weight = p.weight, t.bias = p.bias, t.grad = p.grad;
  t.out = p.out, t.sums = static_cast<float*>(p.sums);
  t.channels = static_cast<int>(p.channels);
}

template <bool pure>
struct PureTag {
  static constexpr bool value = pure;
};

// f(kind, pure, element) for the dtypes of the tiled kernels.
template <typename F>
void with_case(const PdcProblem& p, F f) {
  const auto with_element = [&](auto kind, auto pure) {
    if (p.dtype == DType::f32) f(kind, pure, float{});
    if (p.dtype == DType::bf16) f(kind, pure, bf16{});
    if (p.dtype == DType::f16) f(kind, pure, f16{});
  };
  with_kind(p.kind, [&](auto kind) {
    if constexpr (decltype(kind)::value == PdcKind::vanilla) {
      with_element(kind, PureTag<true>{});
    } else if (p.theta == 1) {
      with_element(kind, PureTag<true>{});
    } else {
      with_element(kind, PureTag<false>{});
    }
  });
}

}  // namespace frd
