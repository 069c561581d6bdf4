#include "pdc/cuda/plan.h"
#include "pdc/cuda/planes.cuh"

namespace frd {
namespace {

// More rows share more differences and loads (8 x 8 outputs of the angular kind take 2.8 subtractions each,
// not 8) until the windows no longer fit the registers; single columns have more of them to spare.
constexpr int rows_of(PdcKind kind, int columns, bool backward) {
  const bool radial = kind == PdcKind::radial;
  if (columns == 1) return radial ? 8 : 16;
  return radial && backward && columns == 8 ? 4 : 8;
}

// Whole vectors only, so that no vector hangs over the edge of x or of dy.
bool vectors_fit(const PdcProblem& p) {
  const int element = p.dtype == DType::f32 ? 4 : 2;
  return p.x.dilation == 1 && p.x.source == p.x.out && p.x.source * element % 16 == 0 && all_aligned(p, 16);
}

Plan planes_plan(const PdcProblem& p, bool backward) {
  PdcTiles t{};
  set_pointers(t, p);
  const Frame fy = frame_of(p.y, p.kind, backward), fx = frame_of(p.x, p.kind, backward);
  t.y = tile_axis(p.y, fy), t.x = tile_axis(p.x, fx);
  t.groups = Divisor(p.channels);
  const int columns = !vectors_fit(p) ? 1 : p.dtype == DType::f32 ? 4 : 8;
  t.y.per_phase =
      Divisor(ceil_divide(ceil_divide(fy.size, p.y.dilation), rows_of(p.kind, columns, backward)));
  const int64_t rows = t.y.per_phase.value * phases_of(p.y, fy), per_row = ceil_divide(fx.size, columns);
  t.per_row = Divisor(per_row), t.per_image = Divisor(rows * per_row);
  const int64_t units = p.batch * rows * per_row;
  t.units = static_cast<int>(backward ? units : units * p.channels);
  const int64_t warps = kBlocksWanted * (kPlaneThreads / 32);
  t.parts = balanced_parts(ceil_divide(units, 32), std::min<int64_t>(kMostParts, warps / p.channels));
  return {t, units * p.channels};
}

template <class T, PdcKind kind, bool pure, int columns>
void launch(const PdcTiles& t, bool backward, cudaStream_t stream) {
  if (backward) {
    const int64_t warps = static_cast<int64_t>(t.parts) * t.groups.value;
    FRD_LAUNCH((pdc_planes_backward<T, kind, pure, rows_of(kind, columns, true), columns>),
               static_cast<unsigned>(ceil_divide(warps, kPlaneThreads / 32)), kPlaneThreads, 0, stream, t);
  } else {
    FRD_LAUNCH((pdc_planes_forward<T, kind, pure, rows_of(kind, columns, false), columns>),
               static_cast<unsigned>(ceil_divide(t.units, kPlaneThreads)), kPlaneThreads, 0, stream, t);
  }
}

}  // namespace

bool pdc_planes_fit(const PdcProblem& p) {
  if (p.pixels || p.dtype == DType::f64 || !fits_tiles(p.y) || !fits_tiles(p.x)) return false;
  return planes_plan(p, false).fits() && planes_plan(p, true).fits();
}

int pdc_planes_parts(const PdcProblem& p) { return planes_plan(p, true).tiles.parts; }

cudaError_t pdc_planes_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  const PdcTiles t = planes_plan(p, backward).tiles;
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
