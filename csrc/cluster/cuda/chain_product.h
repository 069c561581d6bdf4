// A launch that computes a list of matrix products, the one form of product in the chain. No torch here.
#pragma once
#include <cuda_runtime_api.h>

#include "cluster/common.h"
#include "cluster/cuda/block.h"

namespace frd {
namespace chain {

// Elements at data + item * .item + row * .row + column * .column, in elements of the dtype (f32, f16, bf16).
struct Matrix {
  void* data;
  DType dtype;
  int64_t item, row, column;
};

// to = left right + bias + add for each item; or, with sum_items, one matrix: the sum over the items.
struct Product {
  int items, rows, columns, depth;
  Matrix left;       // [rows, depth]
  Matrix right;      // [depth, columns]
  Matrix to;         // [rows, columns]
  const void* bias;  // [columns] of bias_dtype, or null
  DType bias_dtype;
  Matrix add;          // [rows, columns], or data null; may be `to`
  float* row_squares;  // null, or [items, column tiles, rows]: each tile's sums of squares of `to`
  bool sum_items;
  int parts;  // with sum_items: the depth of all items is cut into so many runs (0 counts as 1), `to` has a
              // matrix for each (stride to.item), which a later launch adds in order; the first has bias and
              // add
  bool right_early;  // `right` is an input, or older than the previous launch, and is read before that ends
};

FRD_HD static inline int column_tiles(int columns) { return (columns + kTileColumns - 1) / kTileColumns; }

constexpr int kMaxProducts = 8;

// float_parts: bf16 numbers that stand for a float in a product, 2 (error 2^-16) or 3 (2^-24); bf16 is one
// part, f16 two. The products of parts i + j < float_parts are summed in float.
struct Products {
  int count, float_parts;
  Product product[kMaxProducts];
};

cudaError_t run_products(const Products& products, cudaStream_t stream);

}  // namespace chain
}  // namespace frd
