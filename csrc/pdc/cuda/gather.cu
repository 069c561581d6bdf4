#include "pdc/cuda/gather.cuh"
#include "pdc/cuda/plan.h"

namespace frd {
namespace {

int lanes_of(const PdcProblem& p) { return p.pixels ? 32 : 1; }

PdcGather gather_of(const PdcProblem& p, const PdcAxis& y, const PdcAxis& x) {
  PdcGather g{};
  g.y = y, g.x = x;
  g.insert_y = Divisor(y.insert), g.insert_x = Divisor(x.insert);
  g.channels = static_cast<int>(p.channels), g.pixels = p.pixels;
  g.theta = p.theta, g.pure = p.theta == 1;
  g.source = p.source, g.weight = p.weight, g.bias = p.bias, g.grad = p.grad;
  g.out = p.out, g.sums = p.sums;
  return g;
}

PdcGather sums_of(const PdcProblem& p) {
  PdcGather g = gather_of(p, p.y, p.x);
  const int64_t pixels = p.y.out * p.x.out, chunk = kGatherThreads / lanes_of(p) * kGatherChunk;
  g.outputs = static_cast<int>(pixels);
  g.inner = Divisor(p.x.out);
  g.chunks = Divisor(ceil_divide(pixels, chunk));
  const int64_t units = p.batch * g.chunks.value;
  g.units = static_cast<int>(units);
  g.parts = balanced_parts(
      units, std::min<int64_t>(kMostParts, kBlocksWanted / ceil_divide(p.channels, lanes_of(p))));
  return g;
}

template <typename F>
void with_kind_and_dtype(PdcKind kind, DType dtype, F f) {
  with_kind(kind, [&](auto k) { with_dtype(dtype, [&](auto element) { f(k, element); }); });
}

// The output of `kind` over g.source.
void launch_stencil(PdcGather g, PdcKind kind, const PdcProblem& p, cudaStream_t stream) {
  const int64_t outputs = g.y.out * g.x.out * p.channels;
  if (outputs == 0) return;
  g.outputs = static_cast<int>(outputs);
  g.inner = Divisor(p.pixels ? p.channels : g.x.out), g.middle = Divisor(p.pixels ? g.x.out : g.y.out);
  g.chunks = Divisor(ceil_divide(outputs, kGatherThreads));
  const unsigned blocks = static_cast<unsigned>(p.batch * g.chunks.value);
  with_kind_and_dtype(kind, p.dtype, [&](auto k, auto element) {
    FRD_LAUNCH((pdc_gather_stencil<decltype(element), decltype(k)::value>), blocks, kGatherThreads, 0, stream,
               g);
  });
}

}  // namespace

int pdc_gather_parts(const PdcProblem& p) { return sums_of(p).parts; }

cudaError_t pdc_gather_launch(const PdcProblem& p, bool backward, cudaStream_t stream) {
  if (!backward) {
    launch_stencil(gather_of(p, p.y, p.x), p.kind, p, stream);
    return cudaGetLastError();
  }
  if (p.out) {
    PdcGather g = gather_of(p, turned(p.y, p.kind), turned(p.x, p.kind));
    g.source = p.grad, g.turned = true, g.turned_from = p.kind;
    launch_stencil(g, turned_kind(p.kind), p, stream);
  }
  if (p.sums) {
    const PdcGather g = sums_of(p);
    const unsigned blocks = static_cast<unsigned>(g.parts * ceil_divide(p.channels, lanes_of(p)));
    with_kind_and_dtype(p.kind, p.dtype, [&](auto k, auto element) {
      FRD_LAUNCH((pdc_gather_sums<decltype(element), decltype(k)::value>), blocks, kGatherThreads, 0, stream,
                 g);
    });
  }
  return cudaGetLastError();
}

int pdc_parts_cuda(const PdcProblem& p) {
  if (pdc_pixels_fit(p)) return pdc_pixels_parts(p);
  return pdc_planes_fit(p) ? pdc_planes_parts(p) : pdc_gather_parts(p);
}

cudaError_t pdc_forward_cuda(const PdcProblem& p, cudaStream_t stream) {
  if (pdc_pixels_fit(p)) return pdc_pixels_launch(p, false, stream);
  return pdc_planes_fit(p) ? pdc_planes_launch(p, false, stream) : pdc_gather_launch(p, false, stream);
}

cudaError_t pdc_backward_cuda(const PdcProblem& p, cudaStream_t stream) {
  const cudaError_t error = pdc_pixels_fit(p)   ? pdc_pixels_launch(p, true, stream)
                            : pdc_planes_fit(p) ? pdc_planes_launch(p, true, stream)
                                                : pdc_gather_launch(p, true, stream);
  if (error != cudaSuccess || !p.sums) return error;
  const int parts = pdc_parts_cuda(p), channels = static_cast<int>(p.channels);
  const unsigned blocks = static_cast<unsigned>(ceil_divide(channels, kAddLanes) * kPdcSums);
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    FRD_LAUNCH((pdc_add_parts<T>), blocks, kAddLanes * kAddRows, 0, stream,
               static_cast<const compute_t<T>*>(p.sums), parts, channels, static_cast<T*>(p.dw),
               static_cast<T*>(p.db));
  });
  return cudaGetLastError();
}

}  // namespace frd
