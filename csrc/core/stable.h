// The only torch headers that the project includes: LibTorch's stable ABI.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "dtypes.h"

namespace frd {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] void throw_value_error(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  // torch translates it to Python's ValueError.
  throw std::invalid_argument(message.str());
}

#define FRD_CHECK_VALUE(cond, ...)                      \
  do {                                                  \
    if (!(cond)) ::frd::throw_value_error(__VA_ARGS__); \
  } while (0)

// The dtype of t, the argument `name`.
inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw_value_error("frd: ", name, " must be float32, float64, float16 or bfloat16, got ",
                        torch::headeronly::toString(t.scalar_type()));
  }
}
}  // namespace frd
