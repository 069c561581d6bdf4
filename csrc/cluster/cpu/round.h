// Arguments of one round of clustering on the CPU, shared by the operators `cluster` and `icm`. No torch
// here.
#pragma once
#include <cstdint>

#include "cluster/common.h"

namespace frd {

// Memory with one block for each item of the batch: item b's begins at data + b * stride.
template <class A>
struct PerItem {
  A* data = nullptr;
  int64_t stride = 0;
  A* operator[](int64_t b) const { return data + b * stride; }
};

constexpr int64_t kCentreBlock = 32;  // centres in one piece of work

// One round: B items of N = height * width tokens with C channels, pooled and gathered into O = rows *
// columns centres. A is the type of all sums. Keys and values are either given, or projections of the same
// tokens; where a projection is null they are the tokens themselves.
template <class A>
struct Round {
  int64_t batch, channels, height, width, rows, columns;
  int64_t chunks;  // a pass over an item's tokens runs in so many pieces: a function of N and O only

  TokenView keys, values;  // [B, N, C]
  bool shared;             // keys and values come from the same tokens, which are pooled once

  const A* key_weight;    // Wk [C, C] (output, input), or null
  const A* key_packed;    // its transpose as a GEMM's right side
  const A* key_bias;      // bk [C]
  const A* value_packed;  // transpose of Wv [C, C] as a GEMM's right side, or null
  const A* value_bias;    // bv [C]

  bool weighted;  // tokens weigh sigmoid(beta + alpha * cosine) instead of 1
  A alpha, beta;
  A order = 1;  // the arg-max is over the cosines times its sign

  bool masked = false;  // tokens labelled -1 before the round take no part; else there are none

  // kept for the backward pass
  PerItem<int32_t> labels;  // [N] own centre; -1 for a token that takes no part
  PerItem<A> cosine;        // [N] with the own centre
  PerItem<A> scale;         // [N] 1 / max(norm of the key, kNormFloor)
  PerItem<A> pooled;        // [O, C] bin means of the values' tokens
  PerItem<A> unit;          // [O, C] keys of the pooled tokens, divided by their norms
  PerItem<A> unit_scale;    // [O] 1 / max(norm of the pooled key, kNormFloor)
  PerItem<A> mean;          // [O, C] (pooled + weighted sum of the cluster's tokens) / mass
  PerItem<A> mass;          // [O] 1 + sum of the cluster's weights
  PerItem<A> share;         // [O] 1 / tokens of the bin, 0 where it has none
  PerItem<A> result;        // [O, C] the mean through the value projection; the round's centres

  // results of the operator `cluster` beyond the labels
  PerItem<A> similarity;    // [N] with the own centre
  PerItem<int32_t> counts;  // [O]
  TokenView result_view;    // [B, O, C] the centres in the values' dtype

  // workspace
  PerItem<A> pooled_keys;  // [O, C] bin means of the keys' tokens; is `pooled` where shared
  PerItem<A> unit_packed;  // transpose of `unit` [C, O] as a GEMM's right side
  PerItem<A> sums;         // [chunks, O, C] weighted sums of tokens
  PerItem<A> weights;      // [chunks, O] sums of weights

  int64_t tokens() const { return height * width; }
  int64_t centres() const { return rows * columns; }
  int64_t blocks() const { return (centres() + kCentreBlock - 1) / kCentreBlock; }
  // Whether token n of item b takes part. One that does not may hold NaN: skip it, do not multiply it by 0.
  bool takes_part(int64_t b, int64_t n) const { return !masked || labels[b][n] >= 0; }
};

// Eq. 4: output = sigmoid(alpha * S + beta) R with S = product of the rounds' cosines [N, J] and R the last
// centres [J, C]. S = unit keys * Q for a Q [C, J] made from the later rounds, so it is made token by token,
// never stored.
template <class A>
struct DenseDispatch {
  int64_t columns;       // J
  PerItem<A> projected;  // [J, C] Q^T Wk
  PerItem<A> offset;     // [J] Q^T bk
  PerItem<A> last;       // [J, C] centres of the last round
  A alpha, beta;
  TokenView grad;  // [B, N, C] of the output
};

// Gradients of one round, from those of its centres and similarities to those of its tokens and parameters.
template <class A>
struct RoundGrad {
  const A* key_rows;    // Wk [C, C] (output, input) as a GEMM's right side, or null
  const A* value_rows;  // Wv likewise

  // The keys of tokens have their gradient from the own similarity or, dense, from the product of the cosines
  // P [N, J] = unit keys * Q: given, or made again token by token in the first round.
  bool dense;
  int64_t columns;                   // J
  PerItem<A> query;                  // [J, C] Q^T
  PerItem<A> product;                // [N, J]
  PerItem<A> product_grad;           // [N, J]
  const DenseDispatch<A>* dispatch;  // first round: makes the two above

  PerItem<A> result_grad;      // [O, C] of the centres
  PerItem<A> mean_grad;        // [O, C] of the mean, divided by the mass
  PerItem<A> mean_dot;         // [O] mean . mean_grad
  PerItem<A> similarity_grad;  // [N] of the own similarity
  PerItem<A> pull;             // [N] gradient of the own cosine, times `scale`
  PerItem<A> sums;             // [chunks, O, C] sums of pull * key's token
  PerItem<A> pulls;            // [chunks, O] sums of pull
  PerItem<A> gate_grad;        // [chunks, 2] of alpha and beta
  PerItem<A> unit_grad;        // [O, C] of `unit`; given where dense
  PerItem<A> centre_grad;      // [O, C] of the keys of the pooled tokens
  PerItem<A> pooled_grad;      // [O, C] of the pooled tokens; not shared: of the pooled keys

  TokenView keys_grad;    // [B, N, C]; shared: of the tokens
  TokenView values_grad;  // [B, N, C]; unused where shared

  int64_t
      groups;  // Wk's gradient by way of the tokens is summed in so many pieces: a function of shapes only
  A* weight_sums;            // [groups, C, C]
  A* bias_sums;              // [groups, C]
  PerItem<A> pooled_packed;  // `pooled` [O, C] as a GEMM's right side
  PerItem<A> mean_packed;    // `mean` likewise
  TokenView weight_grad[2];  // Wk's, Wv's [1, C, C]
  TokenView bias_grad[2];    // bk's, bv's [1, 1, C]
};

}  // namespace frd
