// What the chain's operators take from their arguments: sizes, rounds, projections and gates.
#pragma once
#include <climits>

#include "cluster/cuda/chain.h"
#include "cluster/op.h"

namespace frd {
namespace chain {

inline int int_of(int64_t v, const char* what) {
  FRD_CHECK_VALUE(v <= INT_MAX, "frd: ", what, " is too large for CUDA: ", v);
  return static_cast<int>(v);
}

// The rounds of a call, and the contiguous copies that they point into.
class Call {
 public:
  // tokens [B, N, C]
  explicit Call(const Tensor& tokens) : tokens_(tokens) {
    dtype = dtype_of(tokens, "tokens");
    FRD_CHECK_VALUE(dtype != DType::f64,
                    "frd: the chain of launches takes float32, float16 and bfloat16, got float64");
    batch = int_of(tokens.size(0), "the batch");
    channels = int_of(tokens.size(2), "the number of channels");
    const int64_t count = int_of(tokens.size(1), "the number of tokens");
    int_of(batch * count, "the number of tokens of the batch");
    int_of(batch * (count / 32 + 1) * (channels / 32 + 1), "the number of blocks");
  }

  // Rounds in order, each with its grid of centres.
  Round& add_round(int64_t height, int64_t width, int64_t rows, int64_t columns) {
    FRD_CHECK_VALUE(count < kMaxRounds, "frd: on CUDA an icm has at most ", kMaxRounds, " rounds");
    int_of(batch * rows * columns, "the number of centres of the batch");
    int_of(batch * (rows * columns / 32 + 1) * (channels / 32 + 1), "the number of centres");
    int_of((rows + 1) * height + rows, "the height of the tokens times that of the grid");
    int_of((columns + 1) * width + columns, "the width of the tokens times that of the grid");
    Round& r = round[count++];
    r.height = static_cast<int>(height), r.width = static_cast<int>(width);
    r.rows = static_cast<int>(rows), r.columns = static_cast<int>(columns);
    r.labels = label_stride;
    label_stride += r.tokens();
    return r;
  }
  void add_rounds(const IcmInputs& in) {
    for (int64_t t = 0; t < in.count(); ++t) {
      const int64_t *image = t == 0 ? in.hw.data() : &in.grids[2 * t - 2], *grid = &in.grids[2 * t];
      Round& r = add_round(image[0], image[1], grid[0], grid[1]);
      if (!in.projected(t)) continue;
      const Tensor* p = &in.projections[4 * t];
      r.key_weight = keep(p[0]), r.key_bias = keep(p[1]);
      r.value_weight = keep(p[2]), r.value_bias = keep(p[3]);
    }
  }

  // alpha or beta [size]
  const float* gate(const Tensor& t, int64_t size, const char* name) {
    return static_cast<const float*>(keep(check_gate(t, tokens_, size, name)));
  }
  const void* keep(const Tensor& t) {
    alive_.push_back(in_layout(t));
    return alive_.back().const_data_ptr();
  }

  DType dtype;
  int64_t batch;
  int channels, count = 0;
  Round round[kMaxRounds] = {};
  int64_t label_stride = 0;

 private:
  const Tensor& tokens_;
  std::vector<Tensor> alive_;
};

}  // namespace chain
}  // namespace frd
