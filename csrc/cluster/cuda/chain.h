// Arguments of the clustering as a chain of plain launches, and what it saves for its backward. No torch
// here.
//
// The value path is affine and the weights of every mean sum to 1, so that means and projections commute
// (docs/clustering.md): the first means are taken of x, one product with composed weights gives
//   Z [O_1, T C] = mean [Wk_2 Wv_1; Wk_3 Wv_2 Wv_1; ...; Wv_T ... Wv_1]^T + bias,
// and all later rounds are cosines and means of Z.
#pragma once
#include <cuda_runtime_api.h>

#include "cluster/common.h"

namespace frd {
namespace chain {

constexpr int kMaxRounds = 8;

// Parts of a sample's row of `saved` [B, L], a tensor of float: offsets in floats, all multiples of 4. Rows
// [O, C] are stored without gaps.
struct SavedRound {
  int64_t inv_norm;         // [N_t] 1 / norm of the key
  int64_t cosine;           // [N_t] with the own centre
  int64_t pooled;           // [O_t, C] bin means of the keys
  int64_t pooled_inv_norm;  // [O_t] 1 / norm of the pooled key
  int64_t scale;            // [O_t] 1 / (1 + sum of the weights)
  int64_t matrix;           // [N_t, O_t] cosines, variant paper alone
  int64_t rows;  // icm alone: [O_t, (T - t + 1) C] with t from 1: Z, and its means by the rounds 2 .. t; the
                 // first C columns are the keys of round t + 1, the last C end as the centres R_T
};
struct Saved {
  SavedRound round[kMaxRounds];
  int64_t mean;  // [O_1, C] means of x (cluster: of v)
  // Variant paper alone: the products M_t ... M_T of the cosines' matrices, [O_(t-1), J] for t = 2 .. T, one
  // right behind another; M_T is there as well. Forward::links.
  int64_t links;
  int64_t size;
};

struct Round {
  int height, width, rows, columns;  // of the tokens' image; of the grid of centres
  int64_t labels;                    // where its labels begin in an item's
  // Wk [C, C], bk [C], Wv [C, C], bv [C], contiguous, in the dtype of x; all null for no projection
  const void *key_weight, *key_bias, *value_weight, *value_bias;

  FRD_HD int tokens() const { return height * width; }
  FRD_HD int centres() const { return rows * columns; }
};

// round: count of them. icm: with Z and its means; dense: with the cosines' matrices.
inline Saved saved_layout(const Round* round, int count, int channels, bool icm, bool dense) {
  Saved s{};
  const auto take = [&](int64_t floats) {
    const int64_t at = s.size;
    s.size += (floats + 3) / 4 * 4;
    return at;
  };
  for (int t = 0; t < count; ++t) {
    const int64_t tokens = round[t].tokens(), centres = round[t].centres();
    SavedRound& r = s.round[t];
    r.inv_norm = take(tokens);
    r.cosine = take(tokens);
    r.pooled = take(centres * channels);
    r.pooled_inv_norm = take(centres);
    r.scale = take(centres);
    r.matrix = take(dense ? tokens * centres : 0);
    r.rows = take(icm ? centres * (count - t) * channels : 0);
  }
  s.mean = take(round[0].centres() * channels);
  int64_t links = 0;
  for (int t = 1; dense && t < count; ++t) links += int64_t{round[t].tokens()} * round[count - 1].centres();
  s.links = take(links);
  return s;
}

}  // namespace chain
}  // namespace frd
