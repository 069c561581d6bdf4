// Eq. 4 and its gradient on one tile of tokens. Included by *_kernel.cpp only, once per instruction set.
#pragma once
#include "icm/round_tile.h"

namespace frd {
namespace FRD_ISA {
namespace {

// product [m, J]: of the cosines of the tokens [m, C] of item b, 1 / key norm in scale [m].
template <class A>
inline void dense_product(const DenseDispatch<A>& d, int64_t b, const A* tokens, const A* scale, int64_t m,
                          int64_t channels, A* product) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.columns; ++j)
      product[i * d.columns + j] =
          scale[i] * (dot(tokens + i * channels, d.projected[b] + j * channels, channels) + d.offset[b][j]);
}

// From grad [m, C] of the output to that of the sigmoid's argument [m, J]; gate [m, J] is the sigmoid.
template <class A>
inline void dense_gate_grad(const DenseDispatch<A>& d, int64_t b, const A* product, const A* grad, int64_t m,
                            int64_t channels, A* gate, A* argument_grad) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d.columns; ++j) {
      const int64_t at = i * d.columns + j;
      const A g = sigmoid(d.alpha * product[at] + d.beta);
      gate[at] = g;
      argument_grad[at] = dot(grad + i * channels, d.last[b] + j * channels, channels) * g * (A(1) - g);
    }
}

}  // namespace
}  // namespace FRD_ISA
}  // namespace frd
