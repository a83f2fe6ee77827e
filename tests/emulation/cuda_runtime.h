// Runs the kernels of csrc/cuda on the CPU, for tests (tests/emulation/__init__.py builds odtk._C with this in place of
// CUDA's header, so that the tests go through the very bindings and kernels that a GPU gets).
//
// A block's threads are fibers on one CPU thread; a barrier hands over to the next fiber, in an order that is drawn
// anew after every barrier from the seed in ODTK_EMULATION_SEED. So a missing barrier shows as results that depend on
// the seed. Blocks run one after the other, in drawn order too. Only what csrc/cuda uses is here: barriers, atomics, no
// warp intrinsics.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time: what is static is shared by its threads

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

inline unsigned seed() {
  const char* text = std::getenv("ODTK_EMULATION_SEED");
  return text ? static_cast<unsigned>(std::atoi(text)) : 0;
}
inline dim3 thread, block, block_size, grid_size;

class Block {
 public:
  /// Runs `body` once per thread, up to the end of all.
  void run(unsigned threads, const std::function<void()>& body, std::mt19937& random) {
    contexts_.resize(threads);
    stacks_.resize(threads);
    body_ = body;
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; ++t) {
      order[t] = t;
      stacks_[t].resize(kStack);
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_[t].data();
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = &scheduler_;
      makecontext(&contexts_[t], &Block::enter, 0);
    }
    for (ended_ = 0; ended_ < threads;) {
      const unsigned ended_before = ended_;
      std::shuffle(order.begin(), order.end(), random);
      for (const unsigned t : order) {
        current_ = t;
        thread = dim3(t, 0, 0);
        swapcontext(&scheduler_, &contexts_[t]);
      }
      if (ended_ != ended_before && ended_ != threads) {
        std::fprintf(stderr, "emulation: a barrier was not reached by all threads\n");
        std::abort();
      }
    }
  }
  void barrier() { swapcontext(&contexts_[current_], &scheduler_); }

 private:
  static constexpr std::size_t kStack = 32 << 10;
  static void enter();
  std::vector<ucontext_t> contexts_;
  std::vector<std::vector<char>> stacks_;
  ucontext_t scheduler_;
  std::function<void()> body_;
  unsigned current_ = 0, ended_ = 0;
};

inline Block running;
inline void Block::enter() {
  running.body_();
  ++running.ended_;
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

inline void __syncthreads() { emulation::running.barrier(); }

template <typename T, typename U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T, typename U>
T atomicOr(T* at, U value) {
  const T before = *at;
  *at |= value;
  return before;
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
using std::max;
using std::min;

namespace odtk {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's parameters are limited to 4 KiB");
  const std::tuple<Parameters...> values(arguments...);
  std::mt19937 random(emulation::seed());
  emulation::block_size = block;
  emulation::grid_size = grid;
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y);
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const dim3& at : blocks) {
    emulation::block = at;
    emulation::running.run(block.x, [&] { std::apply(kernel, values); }, random);
  }
}

}  // namespace odtk
