// The kernel of the products: a block for each tile [32, 64] of a product's item, or of a part of its sum.
#pragma once
#include "cluster/cuda/chain_product.h"
#include "cluster/cuda/chain_slab.cuh"
#include "core/dependent_launch.cuh"

namespace frd {
namespace chain {

// A product with what the launch derives from it.
struct Task {
  Product product;
  int first_block, row_tiles;
  int rows_of_item;  // the items may have become rows
  Operand left, right;
  int window;       // slabs in shared memory at a time
  bool by_columns;  // how `to` is written
};
struct Tasks {
  int count, blocks, bytes, float_parts;
  Task task[kMaxProducts];
};

// Of products whose blocks share a launch, two on a multiprocessor.
cudaError_t plan_tasks(const Products& products, Tasks* tasks);

// What a block computes: of an item, or a part of the sum.
struct Tile {
  int item, row, column;
};

FRD_DEVICE float load_any(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f16) return load(static_cast<const f16*>(data)[i]);
  return load(static_cast<const bf16*>(data)[i]);
}
FRD_DEVICE void store_any(void* data, DType dtype, int64_t i, float v) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = v;
  else if (dtype == DType::f16)
    store(static_cast<f16*>(data)[i], v);
  else
    store(static_cast<bf16*>(data)[i], v);
}
FRD_DEVICE int64_t at(const Matrix& m, int64_t item, int row, int column) {
  return item * m.item + row * m.row + column * m.column;
}

// to = sums [32, 64] in shared memory + bias + add
FRD_DEVICE void write_tile(const float* sums, const Task& t, const Tile& tile) {
  constexpr int kRowsOfWarp = kTileRows / kBlockWarps, kColumnsOfWarp = kTileColumns / kBlockWarps;
  const Product& p = t.product;
  const int lane = lane_of_warp(), warp = warp_of_block();
  const bool begins = !p.sum_items || tile.item == 0;
#pragma unroll 1
  for (int u = 0; u < kRowsOfWarp; ++u) {
    float square = 0;
    int row = warp * kRowsOfWarp + u;
    FRD_UNROLL
    for (int e = 0; e < 2; ++e) {
      int column = lane + 32 * e;
      if (t.by_columns) row = lane, column = warp * kColumnsOfWarp + 2 * u + e;
      const int r = tile.row + row, c = tile.column + column;
      if (r >= p.rows || c >= p.columns) continue;
      float v = sums[row * kTilePitch + column];
      if (begins && p.bias) v += load_any(p.bias, p.bias_dtype, c);
      if (begins && p.add.data) v += load_any(p.add.data, p.add.dtype, at(p.add, tile.item, r, c));
      square += v * v;
      store_any(p.to.data, p.to.dtype, at(p.to, tile.item, r, c), v);
    }
    if (!p.row_squares) continue;
    square = warp_sum(square);
    const int r = tile.row + row;
    if (lane > 0 || r >= p.rows) continue;
    const int item = tile.item + r / t.rows_of_item;
    p.row_squares[(static_cast<int64_t>(item) * column_tiles(p.columns) + tile.column / kTileColumns) *
                      t.rows_of_item +
                  r % t.rows_of_item] = square;
  }
}

// Where the slabs of a tile's operands lie in shared memory.
struct TileMemory {
  char *left, *right;
};

// Slabs of both operands, all of an item; what the launch has to wait for it waits for once.
FRD_DEVICE void fetch_window(const Task& t, const Tile& tile, const TileMemory& memory, int item, int first,
                             int slabs, bool& waited) {
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {  // a loop, as the code is long
    if (!waited && (side == 1 || !t.product.right_early)) {
      wait_for_previous();
      let_next_start();
      waited = true;
    }
    const Operand& all = side == 0 ? t.right : t.left;
    const Operand operand = all.from(item, side == 0 ? tile.column : tile.row, first * kSlab);
    fetch_operand<2>(side == 0 ? memory.right : memory.left, operand, slabs);
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// to [rows, columns] = left [rows, depth] right [depth, columns] + bias [columns] + add [rows, columns], a
// tile of it. shared: tasks.bytes
FRD_DEVICE void run_tile(const Tasks& tasks, int block, char* shared) {
  int which = 0;
  while (which + 1 < tasks.count && block >= tasks.task[which + 1].first_block) ++which;
  const Task& t = tasks.task[which];
  const Product& p = t.product;
  block -= t.first_block;
  const int tiles = column_tiles(p.columns);
  const Tile tile{block / tiles / t.row_tiles, block / tiles % t.row_tiles * kTileRows,
                  block % tiles * kTileColumns};
  const int of_item = (p.depth + kSlab - 1) / kSlab;
  const Range range = p.sum_items ? range_of(of_item * p.items, p.parts, tile.item)
                                  : Range{tile.item * of_item, (tile.item + 1) * of_item};
  const TileMemory memory{shared, shared + t.window * t.left.parts * slab_bytes(kTileRows)};
  bool waited = false;
  Sums sums{};
  int begin = range.begin;
  do {  // once even for an empty sum, as every block has to wait
    const int item = of_item ? begin / of_item : 0, first = begin - item * of_item;
    int slabs = range.end - begin < t.window ? range.end - begin : t.window;
    slabs = slabs < of_item - first ? slabs : of_item - first;
    if (begin > range.begin) __syncthreads();
    fetch_window(t, tile, memory, item, first, slabs, waited);
    __syncthreads();
    multiply_any(sums, t.left, memory.left, t.right, memory.right, slabs, tasks.float_parts);
    begin += slabs;
  } while (begin < range.end);
  __syncthreads();
  float* result = reinterpret_cast<float*>(shared);
  write_sums(sums, result);
  __syncthreads();
  write_tile(result, t, tile);
}

}  // namespace chain
}  // namespace frd
