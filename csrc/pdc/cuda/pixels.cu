#include "pdc/cuda/pixels.cuh"
#include "pdc/cuda/plan.h"

namespace frd {
namespace {

// 8 x 4 outputs a warp: their 60 words, converted once, leave 3.3 subtractions an output of the 8 of the
// angular kind; a larger window would leave registers for fewer than 16 warps. Of the radial kind, which
// reaches twice as far, the two windows of the backward fit the 48 KB that a block may have without asking
// only so.
constexpr int kRows = 8;
constexpr int columns_of(PdcKind kind, bool backward) { return kind == PdcKind::radial && backward ? 2 : 4; }

// The width that wastes the fewest lanes on channels that do not exist, of those the widest.
int log_lanes_for(int64_t words) {
  int best = 5;
  for (int log = 4; log >= 3; --log) {
    if (ceil_divide(words, 1 << log) << log < ceil_divide(words, 1 << best) << best) best = log;
  }
  return best;
}

// Fewer warps, and so more blocks, where the problem is small. Returns the tiles of an image.
int64_t set_subtiles(PdcTiles& t, const PdcProblem& p, const Frame& fy, const Frame& fx, bool backward) {
  const int columns = columns_of(p.kind, backward);
  const int64_t lines = ceil_divide(fy.size, p.y.dilation), pixels = ceil_divide(fx.size, p.x.dilation);
  const int warps = backward ? kPixelWarps : pixel_warps(p.kind);
  t.y.subtiles = static_cast<int>(std::min<int64_t>(warps / kPixelWarps, ceil_divide(lines, kRows)));
  t.x.subtiles = static_cast<int>(std::min<int64_t>(kPixelWarps, ceil_divide(pixels, columns)));
  for (;;) {
    t.y.per_phase = Divisor(ceil_divide(lines, t.y.subtiles * kRows));
    t.x.per_phase = Divisor(ceil_divide(pixels, t.x.subtiles * columns));
    const int64_t rows = t.y.per_phase.value * phases_of(p.y, fy);
    const int64_t per_row = t.x.per_phase.value * phases_of(p.x, fx);
    const int64_t blocks = (p.batch * rows * per_row * t.groups.value) >> (5 - t.log_lanes);
    if (blocks >= kProcessors || t.y.subtiles * t.x.subtiles == 1) {
      t.per_row = Divisor(per_row), t.per_image = Divisor(rows * per_row);
      return rows * per_row;
    }
    int& larger = t.y.subtiles > 1 ? t.y.subtiles : t.x.subtiles;
    larger = (larger + 1) / 2;
  }
}

Plan pixels_plan(const PdcProblem& p, bool backward) {
  PdcTiles t{};
  set_pointers(t, p);
  const Frame fy = frame_of(p.y, p.kind, backward), fx = frame_of(p.x, p.kind, backward);
  t.y = tile_axis(p.y, fy), t.x = tile_axis(p.x, fx);
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
  t.units = static_cast<int>(units), t.bundles = static_cast<int>(bundles);
  // A block of the forward goes through up to four tiles with the weights it has loaded.
  const int64_t wanted = backward ? std::min<int64_t>(kMostParts, kBlocksWanted / groups)
                                  : std::max<int64_t>(bundles / 4, 2 * kBlocksWanted / groups);
  t.parts = balanced_parts(bundles, wanted);
  return {t, units * groups};
}

size_t shared_bytes(const PdcTiles& t, PdcKind kind, bool backward) {
  const int halo = 2 * pdc_reach(kind);
  const int rows = t.y.subtiles * kRows + halo, columns = t.x.subtiles * columns_of(kind, backward) + halo;
  return static_cast<size_t>(rows) * columns * kPixelWords * 4 * (backward ? 2 : 1);
}

}  // namespace

bool pdc_pixels_fit(const PdcProblem& p) {
  if (!p.pixels || p.dtype == DType::f64 || !fits_tiles(p.y) || !fits_tiles(p.x)) return false;
  const bool words = p.dtype == DType::f32 || p.channels % 2 == 0;
  return words && all_aligned(p, 4) && pixels_plan(p, false).fits() && pixels_plan(p, true).fits();
}

int pdc_pixels_parts(const PdcProblem& p) { return pixels_plan(p, true).tiles.parts; }

cudaError_t pdc_pixels_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  const PdcTiles t = pixels_plan(p, backward).tiles;
  const unsigned blocks = static_cast<unsigned>(t.parts) * t.groups.value;
  const unsigned threads = 32u * t.y.subtiles * t.x.subtiles;
  const size_t bytes = shared_bytes(t, p.kind, backward);
  with_case(p, [&](auto kind, auto pure, auto element) {
    constexpr PdcKind k = decltype(kind)::value;
    constexpr bool is_pure = decltype(pure)::value;
    using T = decltype(element);
    if (backward) {
      FRD_LAUNCH((pdc_pixels_backward<T, k, is_pure, kRows, columns_of(k, true)>), blocks, threads, bytes,
                 stream, t);
    } else {
      FRD_LAUNCH((pdc_pixels_forward<T, k, is_pure, kRows, columns_of(k, false)>), blocks, threads, bytes,
                 stream, t);
    }
  });
  return cudaGetLastError();
}

}  // namespace frd
