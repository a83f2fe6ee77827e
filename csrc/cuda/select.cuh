// Selection and sorting by one thread block. Everything here is called by all kThreads threads of the block.
//
// A key holds a candidate's place in the total order: the bits of its score (a positive float, so its bits grow with
// it), then the complement of its index. A larger key is a better candidate, ties go to the lower index, no two keys are
// equal, and 0 is no candidate. Hence whatever order the threads come in, the result has the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace odtk {

using Key = unsigned long long;  // what atomics and shared memory take

__device__ inline Key make_key(float score, std::uint32_t index) {
  return static_cast<Key>(__float_as_uint(score)) << 32 | static_cast<std::uint32_t>(~index);
}
__device__ inline float key_score(Key key) { return __uint_as_float(static_cast<std::uint32_t>(key >> 32)); }
__device__ inline std::uint32_t key_index(Key key) { return ~static_cast<std::uint32_t>(key); }

/// Sum of `value` over this thread and those before it. `sums` is shared memory of kThreads.
/// A barrier stands before the return: `sums` may be reused at once.
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

/// Shared memory of cut_key.
template <int kThreads>
struct SelectScratch {
  static constexpr int kBits = 11;  // of a digit
  static constexpr int kBins = 1 << kBits;
  int histogram[kBins];
  int sums[kThreads];
  int digit, wanted, inside;
};

/// The smallest of the `wanted` largest keys: radix selection from the highest digit down.
///
/// `visit(f)` calls f(key) for this thread's share of the keys, the same keys at every call; together the threads visit
/// at least `wanted` keys (>= 1), all non-zero and distinct. Scores are at most 1, so that a key has 62 bits. It ends as
/// soon as the keys with the digits found so far are all wanted: after two or three passes, unless very many scores tie.
template <int kThreads, typename Visit>
__device__ Key cut_key(const Visit& visit, int wanted, SelectScratch<kThreads>& scratch) {
  constexpr int kKeyBits = 62, kBits = SelectScratch<kThreads>::kBits, kBins = SelectScratch<kThreads>::kBins;
  constexpr int kOwn = kBins / kThreads;  // bins of a thread in the scan
  static_assert(kBins % kThreads == 0, "the bins are shared out evenly");
  const int thread = threadIdx.x;

  Key prefix = 0;  // the digits found so far
  for (int high = kKeyBits;;) {
    const int bits = high < kBits ? high : kBits, shift = high - bits;
    for (int bin = thread; bin < kBins; bin += kThreads) scratch.histogram[bin] = 0;
    __syncthreads();

    // A thread counts a run of equal digits by itself: when all scores tie, the atomics do not queue up.
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

/// Sorts keys[0, count) largest first: bitonic. `keys` has room for padded_count(count) and the rest is set to 0.
/// `keys` is shared or global memory that only this block touches. Barriers stand at the start and the end.
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
