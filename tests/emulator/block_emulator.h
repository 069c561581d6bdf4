// Runs a CUDA kernel body on the CPU, one block at a time, for tests without a GPU. Test-only.
// Every thread of a block is a fiber; __syncthreads, __syncwarp, shuffles and votes are points where fibers
// wait for each other. The order in which fibers run is shuffled by a seed, so a missing barrier shows as a
// result that depends on the seed; built with -fsanitize=address, an access outside an array stops the test.
// A barrier that not all threads reach is an error. Not modelled: memory consistency between blocks,
// tensor-core and asynchronous-copy instructions (give those a replaceable function).
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
#define __shared__ static  // one block runs at a time, so a static is the block's own

namespace emu {
constexpr int kWarp = 32;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 * 1024;  // its redzones make frames several times as large
#else
constexpr size_t kStack = 64 * 1024;
#endif
enum class State { ready, at_block_barrier, at_warp_barrier, done };

// A stack on which the threads of one block after another run: made once, as a program launches thousands.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
  dim3 tid;
  int linear = 0;
  int parity =
      0;  // shuffles alternate between two slots, so a fast lane cannot overwrite what a slow one still reads
  void* fake_stack = nullptr;
};
struct Warp {
  uint64_t slot[2][kWarp];
};
struct Block {
  dim3 block_idx, block_dim, grid_dim;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> dynamic_shared;
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

// Releases every group (warp or block) whose living fibers all wait at the same kind of barrier. Returns
// whether any was released.
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
  const size_t n = b.fibers.size();
  for (size_t w = 0; w < n; w += kWarp)
    if (size_t hi = std::min(n, w + kWarp); all(w, hi, State::at_warp_barrier)) wake(w, hi);
  if (!any && all(0, n, State::at_block_barrier)) wake(0, n);
  return any;
}

inline void run_block(Block& b, std::mt19937& rng) {
  block() = &b;
  const int n = static_cast<int>(b.fibers.size());
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) {
    Fiber& f = *b.fibers[i];
    order[i] = i;
    f.state = State::ready;
    f.parity = 0;
    f.linear = i;
    f.tid = dim3(i % b.block_dim.x, i / b.block_dim.x % b.block_dim.y, i / (b.block_dim.x * b.block_dim.y));
  }
  for (int alive = n; alive > 0;) {
    std::shuffle(order.begin(), order.end(), rng);
    bool ran = false;
    for (int i : order) {
      Fiber& f = *b.fibers[i];
      if (f.state != State::ready) continue;
      ran = true;
      resume(b, f);
      if (f.state == State::done) --alive;
    }
    if (alive > 0 && !release(b) && !ran) {
      std::fprintf(stderr,
                   "block emulator: deadlock: the threads of block (%u,%u,%u) wait at different barriers\n",
                   b.block_idx.x, b.block_idx.y, b.block_idx.z);
      std::abort();
    }
  }
}

// kernel<<<grid, block, shared_bytes>>>(args...) on the CPU; one launch at a time, whichever thread calls.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block_dim, size_t shared_bytes, unsigned seed, A... args) {
  static std::mutex one;
  const std::lock_guard<std::mutex> guard(one);
  Block b;
  b.block_dim = block_dim;
  b.grid_dim = grid;
  const size_t threads = size_t(block_dim.x) * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0) {
    std::fprintf(stderr, "block emulator: a card refuses the launch of (%u,%u,%u) blocks of %zu threads\n",
                 grid.x, grid.y, grid.z, threads);
    std::abort();
  }
  while (pool().size() < threads) new_fiber();
  for (size_t i = 0; i < threads; ++i) b.fibers.push_back(pool()[i].get());
  b.warps.resize((threads + kWarp - 1) / kWarp);
  b.body = [&] { kernel(static_cast<P>(args)...); };
  std::mt19937 rng(seed);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.block_idx = dim3(x, y, z);
        b.dynamic_shared.assign(shared_bytes,
                                0xff);  // NaN in every float format: a read before a write shows
        run_block(b, rng);
      }
}

template <typename T>
T exchange(T value, int source_lane) {
  static_assert(sizeof(T) <= 8, "shuffle moves at most 8 bytes");
  Block& b = *block();
  Fiber& f = *b.current;
  Warp& w = b.warps[f.linear / kWarp];
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
#define blockIdx (emu::block()->block_idx)
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
inline int __any_sync(unsigned mask, int pred) { return __ballot_sync(mask, pred) != 0; }
inline int __all_sync(unsigned mask, int pred) { return __ballot_sync(mask, !pred) == 0; }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
// What core/cuda_compat.h gives to nvcc as <<<>>>. The seed changes from launch to launch.
#define FRD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emu::launch(kernel, grid, block, shared_bytes, emu::next_seed(stream), __VA_ARGS__)
// Dynamic shared memory, the same line for both compilers: FRD_DYNAMIC_SHARED(float, tile);
#define FRD_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emu::block()->dynamic_shared.data())
