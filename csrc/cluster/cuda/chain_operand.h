// Operands of products from their matrices, on the host.
#pragma once
#include <cstdint>

#include "cluster/cuda/chain_product.h"
#include "cluster/cuda/chain_slab.cuh"

namespace frd {
namespace chain {

// Parts of a number of a dtype.
inline int parts_of(DType dtype, int float_parts) {
  return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : float_parts;
}

// m's data and items with these strides; rows: of its slabs
inline Operand operand_of(const Matrix& m, int64_t outer, int64_t depth, int outers, int depths, int rows,
                          int parts) {
  Operand o{m.data, m.dtype, m.item, outer, depth, outers, depths, rows, parts, false, false};
  o.across = depth != 1 && outer == 1;
  const int64_t group = m.dtype == DType::f32 ? 4 : 8;
  o.aligned = (o.across ? outer : depth) == 1 && (o.across ? outers : depths) % kGroup == 0 &&
              (o.across ? depth : outer) % group == 0 && m.item % group == 0 &&
              reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  return o;
}

}  // namespace chain
}  // namespace frd
