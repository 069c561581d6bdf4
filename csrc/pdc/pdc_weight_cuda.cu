// No torch header here: it compiles in a second, and a plain main() can drive it.
#include "pdc/pdc_weight_cuda.h"
#include "pdc/pdc_weight_dispatch.h"
#include "pdc/pdc_weight_kernel.cuh"

namespace frd {
namespace {

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
                   pairs, a.theta);
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
