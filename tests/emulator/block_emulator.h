// Runs a CUDA kernel body on the CPU, one block or one cluster of blocks at a time, for tests without a GPU.
// Test-only.
// Every thread of a block is a fiber; __syncthreads, __syncwarp, shuffles and votes are points where fibers
// wait for each other. The order in which fibers run is shuffled by a seed, so a missing barrier shows as a
// result that depends on the seed; built with -fsanitize=address, an access outside an array stops the test.
// A barrier that not all threads reach is an error. The blocks of a cluster share one set of fibers; reaching
// into the shared memory of another one before the cluster's first barrier stops the test, after that block
// has ended it reads NaN. Not modelled: memory consistency between blocks, tensor-core and asynchronous-copy
// instructions (give those a replaceable function).
#pragma once
#include <cuda_runtime.h>  // host-side: vector types, dim3; the kernel keywords are empty here
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __forceinline__
#define __forceinline__ inline  // else the host compiler inlines unrolled kernels many times over
#undef __shared__
#define __shared__ static  // the block's own, as one runs at a time; clusters must use dynamic shared memory

namespace emu {
constexpr int kWarp = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;  // its redzones make frames several times as large
#else
constexpr size_t kStack = 64 * 1024;
#endif
enum class State { ready, at_block_barrier, at_warp_barrier, at_cluster_barrier, done };

// A stack on which the threads of one block after another run: made once, as a program launches thousands.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
  dim3 tid;
  int linear = 0;  // in its block
  int rank = 0;    // of its block in the cluster
  int parity =
      0;  // shuffles alternate between two slots, so a fast lane cannot overwrite what a slow one still reads
  void* fake_stack = nullptr;
};
struct Warp {
  uint64_t slot[2][kWarp];
};
// A cluster of blocks; mostly it has one.
struct Block {
  dim3 block_dim, grid_dim;
  std::vector<dim3> block_idx;  // by rank, as the two below
  std::vector<std::vector<unsigned char>> dynamic_shared;
  std::vector<bool> ended;
  int cluster_barriers = 0;
  std::vector<Fiber*> fibers;  // rank after rank
  std::vector<Warp> warps;
  ucontext_t scheduler;
  jmp_buf scheduler_resume;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Fiber* current = nullptr;
  std::function<void()> body;
};
inline Block*& block() {
  static Block* b = nullptr;
  return b;
}
inline std::vector<std::unique_ptr<Fiber>>& pool() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  return fibers;
}

// swapcontext makes two system calls; setjmp makes none, but AddressSanitizer takes a longjmp for a return.
inline void switch_to_scheduler() {
  Block& b = *block();
  Fiber& f = *b.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, b.scheduler_stack, b.scheduler_stack_size);
  swapcontext(&f.context, &b.scheduler);
  __sanitizer_finish_switch_fiber(f.fake_stack, &block()->scheduler_stack, &block()->scheduler_stack_size);
#else
  if (_setjmp(f.resume) == 0) _longjmp(b.scheduler_resume, 1);
#endif
}
inline void wait(State s) {
  block()->current->state = s;
  switch_to_scheduler();
}
inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block()->scheduler_stack, &block()->scheduler_stack_size);
#endif
  for (;;) {
    block()->body();
    wait(State::done);
  }
}

inline void resume(Block& b, Fiber& f) {
  b.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStack);
  swapcontext(&b.scheduler, &f.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  if (_setjmp(b.scheduler_resume) != 0) return;
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.context);
#endif
}

inline Fiber* new_fiber() {
  auto f = std::make_unique<Fiber>();
  f->stack.reset(new char[kStack]);
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack.get();
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = nullptr;
  makecontext(&f->context, entry, 0);
  pool().push_back(std::move(f));
  return pool().back().get();
}

// Releases every group (warp, block or cluster) whose living fibers all wait at the same kind of barrier.
// Returns whether any was released.
inline bool release(Block& b) {
  bool any = false;
  auto all = [&](size_t lo, size_t hi, State s) {
    bool found = false;
    for (size_t i = lo; i < hi; ++i) {
      if (b.fibers[i]->state == State::done) continue;
      if (b.fibers[i]->state != s) return false;
      found = true;
    }
    return found;
  };
  auto wake = [&](size_t lo, size_t hi) {
    for (size_t i = lo; i < hi; ++i)
      if (b.fibers[i]->state != State::done) b.fibers[i]->state = State::ready;
    any = true;
  };
  const size_t n = b.fibers.size(), of_block = n / b.block_idx.size();
  for (size_t first = 0; first < n; first += of_block)
    for (size_t w = first; w < first + of_block; w += kWarp)
      if (size_t hi = std::min(first + of_block, w + kWarp); all(w, hi, State::at_warp_barrier)) wake(w, hi);
  if (any) return true;
  for (size_t first = 0; first < n; first += of_block)
    if (all(first, first + of_block, State::at_block_barrier)) wake(first, first + of_block);
  if (!any && all(0, n, State::at_cluster_barrier)) {
    ++b.cluster_barriers;
    wake(0, n);
  }
  return any;
}

// A block's shared memory is gone with its last thread.
inline void end_thread(Block& b, const Fiber& f) {
  const size_t of_block = b.fibers.size() / b.block_idx.size();
  for (size_t i = f.rank * of_block; i < (f.rank + 1) * of_block; ++i)
    if (b.fibers[i]->state != State::done) return;
  b.ended[f.rank] = true;
  std::fill(b.dynamic_shared[f.rank].begin(), b.dynamic_shared[f.rank].end(), 0xff);
}

inline void run_block(Block& b, std::mt19937& rng) {
  block() = &b;
  const int n = static_cast<int>(b.fibers.size());
  const int of_block = n / static_cast<int>(b.block_idx.size());
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) {
    Fiber& f = *b.fibers[i];
    const int t = i % of_block;
    order[i] = i;
    f.state = State::ready;
    f.parity = 0;
    f.linear = t;
    f.rank = i / of_block;
    f.tid = dim3(t % b.block_dim.x, t / b.block_dim.x % b.block_dim.y, t / (b.block_dim.x * b.block_dim.y));
  }
  for (int alive = n; alive > 0;) {
    std::shuffle(order.begin(), order.end(), rng);
    bool ran = false;
    for (int i : order) {
      Fiber& f = *b.fibers[i];
      if (f.state != State::ready) continue;
      ran = true;
      resume(b, f);
      if (f.state != State::done) continue;
      --alive;
      end_thread(b, f);
    }
    if (alive > 0 && !release(b) && !ran) {
      std::fprintf(stderr,
                   "block emulator: deadlock: the threads of block (%u,%u,%u) wait at different barriers\n",
                   b.block_idx[0].x, b.block_idx[0].y, b.block_idx[0].z);
      std::abort();
    }
  }
}

// kernel<<<grid, block, shared_bytes>>>(args...) on the CPU, `cluster` neighbours along x together; one
// launch at a time, whichever thread calls.
template <typename... P, typename... A>
void launch_cluster(void (*kernel)(P...), unsigned cluster, dim3 grid, dim3 block_dim, size_t shared_bytes,
                    unsigned seed, A... args) {
  static std::mutex one;
  const std::lock_guard<std::mutex> guard(one);
  Block b;
  b.block_dim = block_dim;
  b.grid_dim = grid;
  const size_t threads = size_t(block_dim.x) * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || cluster == 0 || cluster > 8 || grid.x % cluster != 0 || shared_bytes > 227 * 1024) {
    std::fprintf(stderr, "block emulator: a card refuses the launch of (%u,%u,%u) blocks of %zu threads\n",
                 grid.x, grid.y, grid.z, threads);
    std::abort();
  }
  while (pool().size() < threads * cluster) new_fiber();
  for (size_t i = 0; i < threads * cluster; ++i) b.fibers.push_back(pool()[i].get());
  b.warps.resize((threads + kWarp - 1) / kWarp * cluster);
  b.body = [&] { kernel(static_cast<P>(args)...); };
  std::mt19937 rng(seed);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        b.block_idx.clear();
        for (unsigned rank = 0; rank < cluster; ++rank) b.block_idx.push_back(dim3(x + rank, y, z));
        // 0xff: NaN in every float format, so that a read before a write shows
        b.dynamic_shared.assign(cluster, std::vector<unsigned char>(shared_bytes, 0xff));
        b.ended.assign(cluster, false);
        b.cluster_barriers = 0;
        run_block(b, rng);
      }
}
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block_dim, size_t shared_bytes, unsigned seed, A... args) {
  launch_cluster(kernel, 1, grid, block_dim, shared_bytes, seed, args...);
}

// Where memory that this thread's block has at `own` lies in the block of that rank.
template <class T>
T* map_shared(T* own, int rank) {
  Block& b = *block();
  if (b.cluster_barriers == 0) {
    std::fprintf(stderr, "block emulator: another block's shared memory is used before it is known to run\n");
    std::abort();
  }
  const auto offset = reinterpret_cast<unsigned char*>(own) - b.dynamic_shared[b.current->rank].data();
  if (offset < 0 || offset > static_cast<ptrdiff_t>(b.dynamic_shared[rank].size())) {
    std::fprintf(stderr, "block emulator: only dynamic shared memory is mapped\n");
    std::abort();
  }
  return reinterpret_cast<T*>(b.dynamic_shared[rank].data() + offset);
}

template <typename T>
T exchange(T value, int source_lane) {
  static_assert(sizeof(T) <= 8, "shuffle moves at most 8 bytes");
  Block& b = *block();
  Fiber& f = *b.current;
  Warp& w = b.warps[f.rank * (b.warps.size() / b.block_idx.size()) + f.linear / kWarp];
  const int p = f.parity;
  f.parity ^= 1;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  w.slot[p][f.linear % kWarp] = bits;
  wait(State::at_warp_barrier);
  T out;
  std::memcpy(&out, &w.slot[p][source_lane & (kWarp - 1)], sizeof(T));
  return out;
}
inline unsigned next_seed(cudaStream_t) {
  static unsigned seed = 0;
  return seed++;
}
inline int lane() { return block()->current->linear % kWarp; }
}  // namespace emu

#define threadIdx (emu::block()->current->tid)
#define blockIdx (emu::block()->block_idx[emu::block()->current->rank])
#define blockDim (emu::block()->block_dim)
#define gridDim (emu::block()->grid_dim)
inline void __syncthreads() { emu::wait(emu::State::at_block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emu::wait(emu::State::at_warp_barrier); }
template <typename T>
T __shfl_sync(unsigned, T v, int src, int = 32) {
  return emu::exchange(v, src);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
  return emu::exchange(v, emu::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T v, int d, int = 32) {
  const int s = emu::lane() + d;
  T o = emu::exchange(v, s < 32 ? s : emu::lane());
  return o;
}
template <typename T>
T __shfl_up_sync(unsigned, T v, int d, int = 32) {
  const int s = emu::lane() - d;
  T o = emu::exchange(v, s >= 0 ? s : emu::lane());
  return o;
}
inline unsigned __ballot_sync(unsigned, int pred) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i)
    r |= unsigned(emu::exchange(pred != 0, i)) << i;  // 32 exchanges: simple, and slow enough not to matter
  return r;
}
inline unsigned __match_any_sync(unsigned, int v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= unsigned(emu::exchange(v, i) == v) << i;
  return r;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __any_sync(unsigned mask, int pred) { return __ballot_sync(mask, pred) != 0; }
inline int __all_sync(unsigned mask, int pred) { return __ballot_sync(mask, !pred) == 0; }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
// What core/cuda_compat.h gives to nvcc as <<<>>>. The seed changes from launch to launch.
#define FRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emu::launch(kernel, grid, block, shared_bytes, emu::next_seed(stream), __VA_ARGS__)
#define FRD_LAUNCH_CLUSTER(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  emu::launch_cluster(kernel, cluster, grid, block, shared_bytes, emu::next_seed(stream), __VA_ARGS__)
// Dynamic shared memory, the same line for both compilers: FRD_DYNAMIC_SHARED(float, tile);
#define FRD_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emu::block()->dynamic_shared[emu::block()->current->rank].data())
