// Forward pass of a round, as stages; each runs over units begin <= u < end, which do not depend on each
// other.
#pragma once
#include "core/isa.h"
#include "icm/round.h"

namespace frd {

template <class A>
struct RoundOps {
  using Stage = void (*)(const Round<A>& round, int64_t begin, int64_t end);
  int64_t (*key_panels)(int64_t centres);        // units of centre_keys for an item
  int64_t (*packed_size)(int64_t k, int64_t n);  // elements of a packed [k, n] matrix
  // packs [k, n] with element (i, j) at in[i * rs + j * cs]
  void (*pack)(const A* in, int64_t rs, int64_t cs, int64_t k, int64_t n, A* packed);
  Stage pool;         // B * rows units: bin means
  Stage centre_keys;  // B * key_panels(O) units: unit keys of the pooled tokens
  Stage assign;       // B * chunks units: labels, cosines, and the clusters' sums
  Stage finish;       // B * blocks units: means and centres
  Stage publish;      // B units: the results of `cluster`
};

struct RoundKernels {
  RoundOps<float> f32;
  RoundOps<double> f64;
};

}  // namespace frd

FRD_ISA_TABLE(RoundKernels, round_kernels)
