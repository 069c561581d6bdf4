// The small pybind11 module: build information, CPU features, metrics over NumPy arrays. Tensors never pass
// through it.
#include <pybind11/pybind11.h>

#include "core/isa.h"
#include "native/metrics_bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features of frd_kernels; the kernels themselves are torch.ops.frd.*";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["git_revision"] = FRD_GIT_REVISION;
    info["cuda_library"] = FRD_HAS_CUDA != 0;
    info["cuda_archs"] = FRD_HAS_CUDA ? FRD_CUDA_ARCHS : "";
    info["cuda_version"] = FRD_HAS_CUDA ? FRD_CUDA_VERSION : "";
    return info;
  });
  m.def("cpu_isa", [] { return frd::isa_name(frd::cpu_isa()); }, "The instruction set the CPU kernels use.");
  frd::native::bind_metrics(m);
}
