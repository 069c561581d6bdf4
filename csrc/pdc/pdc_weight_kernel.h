#pragma once
#include "core/isa.h"
#include "pdc/pdc_taps.h"

namespace frd {

struct PdcWeightArgs {
  const void* in;  // forward: w [pairs, 9]; transposed: gradient of the plain kernel [pairs, side * side]
  void* out;       // forward: v [pairs, side * side]; transposed: gradient of w [pairs, 9]
  DType in_dtype, out_dtype;
  PdcKind kind;
  double theta;
};

struct PdcWeightKernels {
  void (*forward)(const PdcWeightArgs& args, int64_t begin, int64_t end);     // pairs begin <= i < end
  void (*transposed)(const PdcWeightArgs& args, int64_t begin, int64_t end);  // likewise
};

}  // namespace frd

FRD_ISA_TABLE(PdcWeightKernels, pdc_weight_kernels)
