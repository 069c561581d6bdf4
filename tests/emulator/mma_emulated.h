// What core/mma.h gives to the block emulator in place of PTX. Blocks have one dimension and whole warps.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <type_traits>

#include "core/cuda_compat.h"
#include "core/dtypes.h"

namespace frd {
namespace emulated {

// Where the lanes of a warp show each other their operands.
struct Lanes {
  uint32_t words[32][6];
  const unsigned char* rows[32];
};
inline Lanes& lanes() {
  static Lanes warps[8 * 32];
  return warps[emu::block()->current->rank * 32 + threadIdx.x / 32];
}

// A copy takes effect at the wait for its group, so that a forgotten wait leaves the NaN written at its
// issue.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, size;
  unsigned group;
};
struct CopyQueue {
  std::deque<Copy> copies;
  unsigned groups = 0;
  const void* block = nullptr;
  uint3 index{};
};
inline CopyQueue& copies() {
  static CopyQueue threads[8 * 1024];
  CopyQueue& q = threads[emu::block()->current->rank * 1024 + threadIdx.x];
  const uint3 now{blockIdx.x, blockIdx.y, blockIdx.z};
  if (q.block != emu::block() || std::memcmp(&q.index, &now, sizeof(now)) != 0) {
    if (!q.copies.empty()) {
      std::fprintf(stderr, "block emulator: a block ended with a copy that nobody waited for\n");
      std::abort();
    }
    q = CopyQueue{{}, 0, emu::block(), now};
  }
  return q;
}
inline void issue(void* to, const void* from, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(to) % size || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % size) ||
      bytes < 0 || bytes > size) {
    std::fprintf(stderr, "block emulator: cp.async of %d of %d bytes, or not aligned to them\n", bytes, size);
    std::abort();
  }
  std::memset(to, 0xff, size);
  CopyQueue& q = copies();
  q.copies.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, size, q.groups});
}
inline void arrive(unsigned pending) {
  CopyQueue& q = copies();
  while (!q.copies.empty() && q.copies.front().group + pending < q.groups) {
    const Copy& c = q.copies.front();
    std::memset(c.to, 0, c.size);
    if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
    q.copies.pop_front();
  }
}

inline float tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
template <class T>
float half_of(uint32_t word, int index) {
  return load(T{static_cast<uint16_t>(word >> (16 * index))});
}

// d += a b; element(word, i): the i-th of the kPerWord numbers in a register
template <int kPerWord, class Element>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Element& element) {
  Lanes& w = lanes();
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) w.words[lane][i] = a[i];
  w.words[lane][4] = b0, w.words[lane][5] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row_group = lane / 4, upper = i / 2, column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int half = 0; half < 2; ++half)  // columns of a, rows of b: the lower half first
      for (int t = 0; t < 4; ++t)
        for (int e = 0; e < kPerWord; ++e)
          sum += element(w.words[row_group * 4 + t][half * 2 + upper], e) *
                 element(w.words[column * 4 + t][4 + half], e);
    d[i] += sum;
  }
  __syncwarp();
}

}  // namespace emulated

static inline void cp_async_16(void* shared, const void* global, int bytes) {
  emulated::issue(shared, global, bytes, 16);
}
static inline void cp_async_4(void* shared, const void* global, int bytes) {
  emulated::issue(shared, global, bytes, 4);
}
static inline void cp_async_commit() { ++emulated::copies().groups; }
template <int kGroups>
static inline void cp_async_wait() {
  emulated::arrive(kGroups);
}

template <int kCount, bool kTransposed = false>
static inline void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  emulated::Lanes& w = emulated::lanes();
  const int lane = threadIdx.x % 32;
  w.rows[lane] = static_cast<const unsigned char*>(row);
  __syncwarp();
  for (int j = 0; j < kCount; ++j) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int across = lane % 4 * 2 + e, along = lane / 4;
      const int from_row = kTransposed ? across : along, from_column = kTransposed ? along : across;
      if (reinterpret_cast<uintptr_t>(w.rows[8 * j + from_row]) % 16) {
        std::fprintf(stderr, "block emulator: a row of ldmatrix is not aligned to 16 bytes\n");
        std::abort();
      }
      std::memcpy(&pair[e], w.rows[8 * j + from_row] + 2 * from_column, 2);
    }
    r[j] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
  __syncwarp();
}

template <class T>
static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::product<2>(d, a, b0, b1, emulated::half_of<T>);
}
static inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::product<1>(d, a, b0, b1, [](uint32_t word, int) { return emulated::tf32(word); });
}

template <class T>
static inline uint32_t pack(float low, float high) {
  T a, b;
  store(a, low), store(b, high);
  return static_cast<uint32_t>(b.bits) << 16 | a.bits;
}
template <class T>
static inline uint32_t pack_relu(float low, float high) {
  return pack<T>(low <= 0 ? 0.f : low, high <= 0 ? 0.f : high);
}
template <class T>
static inline uint32_t relu_pair(uint32_t v) {
  return pack_relu<T>(emulated::half_of<T>(v, 0), emulated::half_of<T>(v, 1));
}

}  // namespace frd
