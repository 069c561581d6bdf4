// The products of the chain: the first keys, the composition of the later projections and Z. No torch here.
#pragma once
#include "cluster/cuda/chain_forward.h"

namespace frd {
namespace chain {

// weight x + bias, weight [C, C] and bias [C] without gaps; the identity if weight is null.
struct Affine {
  const void *weight, *bias;
  DType dtype;
  bool made;  // by a product, not an input
  bool identity() const { return weight == nullptr; }
};

// The maps from the first means to the parts of Z, Wk_t Wv_(t-1) ... Wv_1 and last Wv_T ... Wv_1, and the
// products that make them: a level takes what the one before it made.
struct Composition {
  Affine key[kMaxRounds];    // [t], of round t + 1 > 1: part t - 1 of Z
  Affine value[kMaxRounds];  // [t]: Wv_(t+1) ... Wv_1; the last one is the last part of Z
  int levels;
  Products level[kMaxRounds];
};

inline Affine key_map(const Round& r, DType dtype) { return {r.key_weight, r.key_bias, dtype, false}; }
inline Affine value_map(const Round& r, DType dtype) { return {r.value_weight, r.value_bias, dtype, false}; }

// Of a float as a factor of a product, for inputs of this dtype.
inline int float_parts(DType dtype) { return dtype == DType::f32 ? 3 : 2; }

// [rows, columns] without gaps
inline Matrix dense_matrix(const void* data, DType dtype, int64_t rows, int64_t columns) {
  return {const_cast<void*>(data), dtype, rows * columns, columns, 1};
}
inline Matrix transposed(Matrix m) { return {m.data, m.dtype, m.item, m.column, m.row}; }
inline Matrix shared_by_items(Matrix m) { return {m.data, m.dtype, 0, m.row, m.column}; }

// Elements of float that composed maps of C channels need.
inline int64_t composition_floats(int count, int channels) {
  return int64_t{2} * count * (channels + 1) * ((channels + 3) / 4 * 4);
}

// to [items, rows, C] = from map^T + bias; a copy where the map is the identity. The previous launch has not
// made the map.
inline Product apply(const Affine& map, int items, int rows, int channels, const Matrix& from,
                     const Matrix& to) {
  Product p{};
  p.items = items, p.rows = rows, p.columns = channels;
  p.to = to;
  if (map.identity()) {
    p.add = from;
    return p;
  }
  p.depth = channels;
  p.left = from;
  p.right = shared_by_items(transposed(dense_matrix(map.weight, map.dtype, channels, channels)));
  p.right_early = true;
  p.bias = map.bias, p.bias_dtype = map.dtype;
  return p;
}

// outer(inner(x)); its products go to `products`, its weight and bias to memory at *to, which moves on.
inline Affine compose(const Affine& outer, const Affine& inner, int channels, Products& products,
                      float** to) {
  if (inner.identity()) return outer;
  if (outer.identity()) return inner;
  const int64_t pitch = (channels + 3) / 4 * 4;
  float *const weight = *to, *const bias = weight + channels * pitch;
  *to = bias + pitch;
  Product w{};
  w.items = 1, w.rows = w.columns = w.depth = channels;
  w.left = dense_matrix(outer.weight, outer.dtype, channels, channels);
  w.right = dense_matrix(inner.weight, inner.dtype, channels, channels);
  w.right_early = !inner.made;
  w.to = dense_matrix(weight, DType::f32, channels, channels);
  products.product[products.count++] = w;
  products.product[products.count++] =
      apply(outer, 1, 1, channels, dense_matrix(inner.bias, inner.dtype, 1, channels),
            dense_matrix(bias, DType::f32, 1, channels));
  return {weight, bias, DType::f32, true};
}

// memory: composition_floats(count, channels)
inline Composition plan_composition(const Round* round, int count, int channels, DType dtype, float* memory) {
  Composition c{};
  c.value[0] = value_map(round[0], dtype);
  for (int t = 1; t < count; ++t) {
    Products& products = c.level[c.levels];
    products.float_parts = float_parts(dtype);
    c.key[t] = compose(key_map(round[t], dtype), c.value[t - 1], channels, products, &memory);
    c.value[t] = compose(value_map(round[t], dtype), c.value[t - 1], channels, products, &memory);
    c.levels += products.count > 0;
  }
  return c;
}

inline void append(Products& to, const Products& more) {
  for (int i = 0; i < more.count; ++i) to.product[to.count++] = more.product[i];
}

// The pooled keys of round 1, and those of the tokens where they go to memory.
inline Products plan_first_keys(const Forward& a) {
  Products products{};
  products.float_parts = float_parts(a.dtype);
  if (!a.projected()) return products;
  const Affine map = key_map(a.round[0], a.dtype);
  const int batch = static_cast<int>(a.batch), rows = a.round[0].centres(), tokens = a.round[0].tokens();
  Matrix pooled = dense_matrix(a.saved + a.at.round[0].pooled, DType::f32, rows, a.channels);
  pooled.item = a.at.size;
  Product& p = products.product[products.count++];
  p = apply(map, batch, rows, a.channels, dense_matrix(a.pooled_values, DType::f32, rows, a.channels),
            pooled);
  p.row_squares = a.pooled_squares;
  if (a.token_keys)
    products.product[products.count++] = apply(
        map, batch, tokens, a.channels, {a.keys.data, a.dtype, a.keys.batch, a.keys.token, a.keys.channel},
        dense_matrix(a.token_keys, DType::f32, tokens, a.channels));
  return products;
}

// rows of round 1, Z [B, O_1, T C] = mean [B, O_1, C] with its maps.
inline Products plan_late_rows(const Forward& a, const Composition& c) {
  Products products{};
  products.float_parts = float_parts(a.dtype);
  const int rows = a.round[0].centres();
  const int64_t width = int64_t{a.count} * a.channels;
  Matrix mean = dense_matrix(a.saved + a.at.mean, DType::f32, rows, a.channels);
  mean.item = a.at.size;
  for (int t = 1; t <= a.count; ++t) {
    float* const to = a.saved + a.at.round[0].rows + int64_t{t - 1} * a.channels;
    products.product[products.count++] =
        apply(t < a.count ? c.key[t] : c.value[a.count - 1], static_cast<int>(a.batch), rows, a.channels,
              mean, {to, DType::f32, a.at.size, width, 1});
  }
  return products;
}

}  // namespace chain
}  // namespace frd
