#include "cluster/cuda/chain_product.cuh"

#include <algorithm>

#include "core/cuda_device.h"

namespace frd {
namespace chain {
namespace {

__global__ void __launch_bounds__(kBlockThreads, 2) product_kernel(const __grid_constant__ Tasks tasks) {
  FRD_DYNAMIC_SHARED(uint4, shared);
  run_tile(tasks, blockIdx.x, reinterpret_cast<char*>(shared));
}

// Items that follow each other as rows do, or for their sum as the depth does, become one with more rows or
// more depth, so that they share tiles.
Task merged(const Product& product) {
  Task t{};
  t.product = product;
  Product& p = t.product;
  t.rows_of_item = p.rows;
  p.parts = std::max(p.parts, 1);
  const auto rows_follow = [&](const Matrix& m) { return !m.data || m.item == p.rows * m.row; };
  if (p.sum_items) {
    if (p.left.item != p.depth * p.left.column || p.right.item != p.depth * p.right.row) return t;
    p.depth *= p.items;
  } else {
    if (p.right.item != 0 || !rows_follow(p.left) || !rows_follow(p.to) || !rows_follow(p.add)) return t;
    p.rows *= p.items;
  }
  p.items = 1;
  return t;
}

// A slab of each operand
int bytes_of_slabs(const Task& t) {
  return t.left.parts * slab_bytes(kTileRows) + t.right.parts * slab_bytes(kTileColumns);
}

// How the operands lie, and the slabs of them that fit into `room` bytes.
void plan(Task& t, int float_parts, int room) {
  const Product& p = t.product;
  const Matrix &l = p.left, &r = p.right;
  t.left = operand_of(l, l.row, l.column, p.rows, p.depth, kTileRows, parts_of(l.dtype, float_parts));
  t.right = operand_of(r, r.column, r.row, p.columns, p.depth, kTileColumns, parts_of(r.dtype, float_parts));
  t.by_columns = p.to.row == 1 && p.to.column != 1 && !p.row_squares;
  t.window = std::max(1, std::min((p.depth + kSlab - 1) / kSlab, room / bytes_of_slabs(t)));
}

}  // namespace

cudaError_t plan_tasks(const Products& products, Tasks* tasks) {
  constexpr int kHalfOfMultiprocessor = 112 * 1024;  // of a Hopper's shared memory
  int room = 0;
  if (const cudaError_t error = device_attribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return error;
  *tasks = {};
  tasks->float_parts = products.float_parts;
  for (int i = 0; i < products.count; ++i) {
    Task t = merged(products.product[i]);
    const Product& p = t.product;
    plan(t, products.float_parts, std::min(room, kHalfOfMultiprocessor));
    t.first_block = tasks->blocks;
    t.row_tiles = (p.rows + kTileRows - 1) / kTileRows;
    tasks->blocks += t.row_tiles * column_tiles(p.columns) * (p.sum_items ? p.parts : p.items);
    tasks->bytes = std::max(tasks->bytes, t.window * bytes_of_slabs(t));
    tasks->task[tasks->count++] = t;
  }
  return cudaSuccess;
}

cudaError_t run_products(const Products& products, cudaStream_t stream) {
  Tasks tasks;
  if (const cudaError_t error = plan_tasks(products, &tasks)) return error;
  if (tasks.blocks == 0) return cudaSuccess;
  return FRD_LAUNCH_DEPENDENT(product_kernel, dim3(tasks.blocks), dim3(kBlockThreads), tasks.bytes, stream,
                              tasks);
}

}  // namespace chain
}  // namespace frd
