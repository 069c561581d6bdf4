// How the kernels of the clustering's gradients lay out their memory. No torch here.
#pragma once
#include <algorithm>

#include "cluster/cuda/to_be_deleted/grad_args.h"

namespace frd {

inline int element_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// Gives out parts of an item's workspace, in elements, aligned for vectors.
class Layout {
 public:
  int64_t take(int64_t size) {
    const int64_t at = used_;
    used_ += (size + 3) / 4 * 4;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// Pieces of a sum over the tokens of a label: enough to keep the warps of a team busy where centres are few,
// and partial sums of no more than a quarter of the tokens. Of N and O alone.
inline int label_parts(int tokens, int centres) {
  return std::max(1, std::min({32, tokens / 32, tokens / (4 * centres)}));
}

// Pieces of a dense sum over the tokens.
inline int dense_parts(int tokens) { return std::max(1, std::min(32, tokens / 16)); }

inline void layout_round(IcmGradArgs& a, int t, Layout& layout) {
  const RoundArgs& r = a.round[t];
  RoundWork& w = a.work[t];
  const int64_t tokens = r.tokens(), centres = r.centres(), size = centres * a.channels;
  const bool projected = r.key_weight != nullptr, flows = a.dispatch && !a.dense;
  w.parts = label_parts(r.tokens(), r.centres());
  w.result_grad = layout.take(a.dispatch ? size : 0);
  w.mean_grad = layout.take(size);
  w.pooled_grad = layout.take(size);
  w.mean_dot = layout.take(centres);
  w.sums = layout.take(a.dense ? 0 : w.parts * size);
  w.pulls = layout.take(a.dense ? 0 : w.parts * centres);
  w.pull = layout.take(a.dense ? 0 : tokens);
  w.similarity_grad = layout.take(flows ? tokens : 0);
  w.flow = layout.take(flows ? tokens : 0);
  w.flow_grad = layout.take(flows ? tokens : 0);
  w.key_grad = layout.take(projected ? (tokens + centres) * a.channels : 0);
  w.token_grad = t > 0 ? a.work[t - 1].result_grad : layout.take(projected ? tokens * a.channels : 0);
  w.product = layout.take(a.dense && t == 0 ? tokens * a.columns : 0);
  w.product_grad = layout.take(a.dense ? tokens * a.columns : 0);
  w.query_grad = layout.take(a.dense ? int64_t{a.columns} * a.channels : 0);
}

inline void layout_dispatch(IcmGradArgs& a, Layout& layout) {
  const int64_t tokens = a.round[0].tokens(), size = int64_t{a.columns} * a.channels;
  int64_t most = 0;
  for (int t = 0; t < a.count; ++t) most = std::max<int64_t>(most, a.round[t].tokens());
  a.dispatch_parts = a.dense ? dense_parts(a.round[0].tokens()) : label_parts(a.round[0].tokens(), a.columns);
  a.last = layout.take(a.dense ? 0 : tokens);
  a.coefficient = layout.take(a.dense ? 0 : tokens);
  a.gate = layout.take(a.dense ? tokens * a.columns : 0);
  a.pull = layout.take(a.dense ? most * a.columns : 0);
  a.last_sums = layout.take(a.dispatch_parts * size);
  a.query_sums = layout.take(a.dense ? a.dispatch_parts * size : 0);
  a.query_pulls = layout.take(a.dense ? int64_t{a.dispatch_parts} * a.columns : 0);
}

// Room for rows of the tokens that have strides other than rows have.
inline void layout_copies(IcmGradArgs& a, Layout& layout) {
  const int64_t bytes = a.dtype == DType::f64 ? 8 : a.dtype == DType::f32 ? 4 : 2;
  const int64_t size = int64_t{a.round[0].tokens()} * a.channels * bytes;
  const auto copy = [&](bool copies) {
    return layout.take(copies ? (size + element_size(a.dtype) - 1) / element_size(a.dtype) : 0);
  };
  a.copies_keys = a.keys.channel != 1;
  a.copies_grad = a.dispatch && a.grad.channel != 1;
  a.keys_copy = copy(a.copies_keys), a.grad_copy = copy(a.copies_grad);
}

// Tiles of rows of a block, in shared memory where at least 8 rows fit.
inline void choose_tile(IcmGradArgs& a, int64_t shared_bytes) {
  a.row_step = element_size(a.dtype) == 8 || a.dtype == DType::f32 ? 4 : 16;
  int most = 0;
  for (int t = 0; t < a.count; ++t) {
    const auto rows = [&](int count) {
      const int share = (count + a.team - 1) / a.team;
      return (share + a.row_step - 1) / a.row_step * a.row_step;
    };
    const int tokens = rows(a.round[t].tokens()), centres = rows(a.round[t].centres());
    most = std::max(most, a.round[t].key_weight != nullptr ? tokens + centres : std::max(tokens, centres));
  }
  const int64_t left =
      (shared_bytes - kGradHeadBytes) / element_size(a.dtype) - (a.projected ? kProductScratch : 0);
  const int64_t fit = left / (2 * tile_pitch(a.channels));
  const int wanted = std::min(64, most);
  a.block_rows = 0;
  if (fit >= std::min(8, wanted)) {
    a.tile = static_cast<int>(std::min<int64_t>(fit, wanted));
    return;
  }
  a.tile = std::min(32, wanted);
  a.block_rows = int64_t{2} * a.tile * tile_pitch(a.channels);
}

// The parts of the projections' gradients.
inline void count_parts(IcmGradArgs& a) {
  int parts = 0;
  for (int t = 0; t < a.count; ++t)
    for (int which = 0; which < 2; ++which) {
      a.first_part[2 * t + which] = parts;
      if (a.round[t].key_weight == nullptr) continue;
      const int64_t rows = a.round[t].centres() + (which == 0 ? a.round[t].tokens() : 0);
      parts += static_cast<int>((a.batch * rows + kPartRows - 1) / kPartRows);
    }
  a.first_part[2 * a.count] = parts;
}

// For teams of so many blocks with so many bytes of shared memory each, from the shapes and
// views of the arguments.
inline void plan_grads(IcmGradArgs& a, int team, int shared_bytes) {
  a.team = team;
  choose_tile(a, shared_bytes);
  Layout layout;
  for (int t = 0; t < a.count; ++t) layout_round(a, t, layout);
  if (a.dispatch) layout_dispatch(a, layout);
  layout_copies(a, layout);
  a.workspace_stride = layout.used();
  count_parts(a);
}

}  // namespace frd
