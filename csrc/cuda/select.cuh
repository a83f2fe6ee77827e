// Selection and sorting by one thread block. All kThreads threads of the block must call these functions together.
//
// For .cu files only. Includes no torch and no TensorRT, and knows nothing of boxes.
//
// A key puts the candidates in a total order: it holds the bits of the score (a positive float, so a higher score has
// larger bits), then the complement of the index. A larger key is a better candidate, ties go to the lower index, no
// two keys are equal, and 0 stands for no candidate. So the result has the same bits in whatever order the threads run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace odtk {

using Key = unsigned long long;  // the 64-bit type that CUDA's atomics take

__device__ inline Key make_key(float score, std::uint32_t index) {
  return static_cast<Key>(__float_as_uint(score)) << 32 | static_cast<std::uint32_t>(~index);
}
__device__ inline float key_score(Key key) { return __uint_as_float(static_cast<std::uint32_t>(key >> 32)); }
__device__ inline std::uint32_t key_index(Key key) { return ~static_cast<std::uint32_t>(key); }

/// The sum of `value` over this thread and those before it. `sums` is shared memory of kThreads elements.
/// It ends with a barrier, so `sums` may be reused at once.
template <int kThreads>
__device__ int inclusive_scan(int value, int* sums) {
  const int thread = threadIdx.x;
  sums[thread] = value;
  for (int distance = 1; distance < kThreads; distance *= 2) {
    __syncthreads();
    const int before = thread >= distance ? sums[thread - distance] : 0;
    __syncthreads();
    value += before;
    sums[thread] = value;
  }
  __syncthreads();
  return value;
}

/// The shared memory of cut_key.
template <int kThreads>
struct SelectScratch {
  static constexpr int kBits = 11;  // of a digit
  static constexpr int kBins = 1 << kBits;
  int histogram[kBins];
  int sums[kThreads];
  int digit, wanted, inside;
};

/// The smallest of the `wanted` largest keys, found by radix selection from the highest digit down.
///
/// `visit(f)` calls f(key) for this thread's share of the keys, the same keys in every call. Together the threads visit
/// at least `wanted` (>= 1) keys, all non-zero and distinct. Scores are at most 1, so a key has 62 bits. The search
/// ends when all keys with the digits found so far are wanted: after two or three passes, unless very many scores tie.
template <int kThreads, typename Visit>
__device__ Key cut_key(const Visit& visit, int wanted, SelectScratch<kThreads>& scratch) {
  constexpr int kKeyBits = 62, kBits = SelectScratch<kThreads>::kBits, kBins = SelectScratch<kThreads>::kBins;
  constexpr int kOwn = kBins / kThreads;  // the bins of each thread in the scan
  static_assert(kBins % kThreads == 0, "every thread must have the same number of bins");
  const int thread = threadIdx.x;

  Key prefix = 0;  // the digits found so far
  for (int high = kKeyBits;;) {
    const int bits = high < kBits ? high : kBits, shift = high - bits;
    for (int bin = thread; bin < kBins; bin += kThreads) scratch.histogram[bin] = 0;
    __syncthreads();

    // A thread counts a run of equal digits before it adds the count, so that ties do not make the atomics wait.
    int run_digit = 0, run = 0;
    visit([&](Key key) {
      if (key >> high != prefix) return;
      const int digit = static_cast<int>(key >> shift) & ((1 << bits) - 1);
      if (digit != run_digit && run > 0) {
        atomicAdd(&scratch.histogram[run_digit], run);
        run = 0;
      }
      run_digit = digit;
      ++run;
    });
    if (run > 0) atomicAdd(&scratch.histogram[run_digit], run);
    __syncthreads();

    // Thread 0 owns the highest bins. Exactly one thread finds the bin in which the count reaches `wanted`.
    const int top = kBins - 1 - thread * kOwn;
    int own = 0;
    for (int i = 0; i < kOwn; ++i) own += scratch.histogram[top - i];
    int above = inclusive_scan<kThreads>(own, scratch.sums) - own;
    if (above < wanted && wanted <= above + own) {
      int bin = top;
      while (above + scratch.histogram[bin] < wanted) above += scratch.histogram[bin--];
      scratch.digit = bin;
      scratch.wanted = wanted - above;
      scratch.inside = scratch.histogram[bin];
    }
    __syncthreads();
    prefix = prefix << bits | static_cast<Key>(scratch.digit);
    wanted = scratch.wanted;
    if (shift == 0 || scratch.inside == wanted) return prefix << shift;
    high = shift;
  }
}

/// The smallest power of two that is at least `count` (>= 1).
__host__ __device__ inline int padded_count(int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
  return padded;
}

/// Sorts keys[0, count), largest first, by a bitonic network. `keys` has room for padded_count(count) keys; the rest is
/// set to 0. It is shared or global memory that only this block uses. There is a barrier at the start and at the end.
template <int kThreads>
__device__ void sort_descending(Key* keys, int count) {
  const int padded = padded_count(count);
  for (int i = count + static_cast<int>(threadIdx.x); i < padded; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int pair = threadIdx.x; pair < padded / 2; pair += kThreads) {
        const int low = pair / distance * distance * 2 + pair % distance, high = low + distance;
        const bool falling = (low & size) == 0;
        const Key a = keys[low], b = keys[high];
        if ((a < b) == falling) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace odtk
