// The kernels of decode.h, in two launches. May not include torch or TensorRT.
//
// find_candidates: the logits are cut into chunks. A block reads one chunk once, with wide loads, and writes the keys
// of its survivors, at most top_n, to a list of its own. merge_candidates: a block takes the lists of one image and
// level, selects the top_n best, sorts them, decodes their boxes and writes the rows.
//
// If a chunk has more than top_n survivors, only its top_n best can matter: its block selects them, reading the chunk
// again from the cache. So the size of the workspace is fixed and never too small, even if every score survives.
#include "decode.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "box.cuh"
#include "launch.cuh"
#include "select.cuh"
#include "workspace.h"

namespace odtk {
namespace {

constexpr int kChunk = 32768;  // logits per block: 64 KiB in fp16, small enough that one image fills a large GPU
constexpr int kFindThreads = 256;
constexpr int kMergeThreads = 1024;
constexpr int kUnroll = 4;  // 16-byte loads in flight per thread

/// What the kernels receive: the params and what is derived from them.
struct Plan {
  DecodeParams params;
  float logit_threshold;
  std::int32_t columns;                      // of the output
  std::int32_t first_column[kMaxLevels];     // of each level
  std::int32_t first_chunk[kMaxLevels + 1];  // of each level, among the chunks of one image; last, their number
};
static_assert(sizeof(Plan) <= 3072, "a kernel's parameters are limited to 4 KiB");

struct Buffers {
  Key* keys;             // [N, chunks, top_n]
  std::int32_t* counts;  // [N, chunks]
};

/// The number of logits of one image in memory, including the padding of channels-last.
__host__ __device__ inline std::int64_t logits_per_image(const DecodeParams& p, const DecodeLevel& level) {
  const int channels = level.logits_pitch > 0 ? level.logits_pitch : p.anchors * p.classes;
  return static_cast<std::int64_t>(channels) * level.height * level.width;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("odtk::decode: ") + what);
}

void check(const DecodeParams& p) {
  require(p.batch >= 1 && p.batch <= 65535, "batch must be 1 to 65535");
  require(p.levels >= 1 && p.levels <= kMaxLevels, "levels must be 1 to 16");
  require(p.anchors >= 1 && p.classes >= 1, "anchors and classes must be at least 1");
  require(p.top_n >= 1 && p.top_n <= kMaxTopN, "top_n must be 1 to 4096");
  require(p.anchor_values == 4 || p.anchor_values == 5, "anchor_values must be 4 or 5");
  require(head_values(p.coder) > 0, "coder is unknown");
  for (const DataType type : {p.logits_type, p.boxes_type}) {
    require(type == DataType::kFloat || type == DataType::kHalf, "logits_type and boxes_type must be fp32 or fp16");
  }
  const std::int64_t channels = static_cast<std::int64_t>(p.anchors) * p.classes;
  for (int l = 0; l < p.levels; ++l) {
    const DecodeLevel& level = p.level[l];
    require(level.height >= 1 && level.width >= 1 && level.stride >= 1, "height, width and stride must be at least 1");
    require(level.logits_pitch == 0 || level.logits_pitch >= channels, "logits_pitch must be 0 or at least A*C");
    require(level.boxes_pitch == 0 || level.boxes_pitch >= p.anchors * head_values(p.coder),
            "boxes_pitch must be 0 or at least A*V");
    const std::int64_t cells = static_cast<std::int64_t>(level.height) * level.width;
    require(cells * std::max<std::int64_t>(channels, level.logits_pitch) < (std::int64_t{1} << 31) - kChunk,
            "a level must have fewer than 2^31 logits per image");
  }
}

Plan make_plan(const DecodeParams& p) {
  check(p);
  Plan plan{};
  plan.params = p;
  const double t = p.score_threshold;
  plan.logit_threshold = static_cast<float>(t <= 0 ? -HUGE_VAL : t >= 1 ? HUGE_VAL : std::log(t / (1 - t)));
  for (int l = 0; l < p.levels; ++l) {
    plan.first_column[l] = plan.columns;
    plan.columns += decode_columns(p, l);
    const std::int64_t chunks = (logits_per_image(p, p.level[l]) + kChunk - 1) / kChunk;
    plan.first_chunk[l + 1] = plan.first_chunk[l] + static_cast<std::int32_t>(chunks);
  }
  return plan;
}

Buffers carve(const Plan& plan, Workspace& workspace) {
  const std::size_t chunks = static_cast<std::size_t>(plan.params.batch) * plan.first_chunk[plan.params.levels];
  Key* const keys = workspace.take<Key>(chunks * plan.params.top_n);
  return {keys, workspace.take<std::int32_t>(chunks)};
}

// ---- reading the heads ----

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }

/// A mask whose bit k is set if logit k of these 16 bytes is above the threshold; NaN never is.
__device__ inline unsigned above(const uint4& bytes, float threshold, float) {
  const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) mask |= static_cast<unsigned>(__uint_as_float(words[i]) > threshold) << i;
  return mask;
}
__device__ inline unsigned above(const uint4& bytes, float threshold, __half) {
  const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffff)));
    const float high = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    mask |= static_cast<unsigned>(low > threshold) << (2 * i) | static_cast<unsigned>(high > threshold) << (2 * i + 1);
  }
  return mask;
}

/// Number v of an anchor at a cell of an image, from the box head.
__device__ inline float head_value(const DecodeParams& p, const DecodeLevel& level, int image, int anchor, int v,
                                  int cell) {
  const int values = head_values(p.coder), channel = anchor * values + v, cells = level.height * level.width;
  const std::int64_t at =
      level.boxes_pitch > 0 ? (static_cast<std::int64_t>(image) * cells + cell) * level.boxes_pitch + channel
                            : (static_cast<std::int64_t>(image) * p.anchors * values + channel) * cells + cell;
  return p.boxes_type == DataType::kHalf ? to_float(static_cast<const __half*>(level.boxes)[at])
                                         : static_cast<const float*>(level.boxes)[at];
}

/// The key of the candidate whose logit is at `offset` in its image's logits; 0 if it does not survive.
template <typename T>
__device__ Key candidate_key(const Plan& plan, const DecodeLevel& level, const T* logits, int image, int offset) {
  const DecodeParams& p = plan.params;
  const float logit = to_float(logits[offset]);
  if (!(logit > plan.logit_threshold)) return 0;
  const int cells = level.height * level.width;
  int channel = offset / cells, cell = offset % cells;  // NCHW
  if (level.logits_pitch > 0) {
    channel = offset % level.logits_pitch;
    cell = offset / level.logits_pitch;
    if (channel >= p.anchors * p.classes) return 0;  // padding
  }
  double precise = sigmoid(logit);
  if (has_centerness(p.coder)) {
    precise = sqrt(precise * sigmoid(head_value(p, level, image, channel / p.classes, box_values(p.coder), cell)));
  }
  const float score = static_cast<float>(precise);
  return score > 0.0f ? make_key(score, static_cast<std::uint32_t>(channel) * cells + cell) : 0;
}

// ---- the kernels ----

/// Calls f(offset) for each of the `count` logits at `logits` that is above the threshold.
template <typename T, typename F>
__device__ void visit_survivors(const T* logits, int count, float threshold, const F& f) {
  constexpr int kWide = 16 / sizeof(T);  // logits per load
  const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(logits) % 16 / sizeof(T));
  const int head = min(count, misaligned == 0 ? 0 : kWide - misaligned);
  const int wides = (count - head) / kWide;
  const uint4* const body = reinterpret_cast<const uint4*>(logits + head);

  for (int base = threadIdx.x; base < wides; base += kFindThreads * kUnroll) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kFindThreads;
      if (i < wides) loaded[u] = __ldg(body + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kFindThreads;
      unsigned mask = i < wides ? above(loaded[u], threshold, T()) : 0;
      for (; mask != 0; mask &= mask - 1) f(head + i * kWide + __ffs(mask) - 1);
    }
  }
  const int ends = count - wides * kWide;  // before and after the aligned body
  for (int i = threadIdx.x; i < ends; i += kFindThreads) {
    const int offset = i < head ? i : i + wides * kWide;
    if (to_float(logits[offset]) > threshold) f(offset);
  }
}

/// grid (chunks of an image, N).
template <typename T>
__global__ void __launch_bounds__(kFindThreads) find_candidates(const Plan plan, const Buffers buffers) {
  __shared__ SelectScratch<kFindThreads> scratch;
  __shared__ int found;

  const DecodeParams& p = plan.params;
  int l = 0;
  while (static_cast<int>(blockIdx.x) >= plan.first_chunk[l + 1]) ++l;
  const DecodeLevel& level = p.level[l];
  const int image = blockIdx.y, top_n = p.top_n;
  const std::int64_t per_image = logits_per_image(p, level);
  const T* const logits = static_cast<const T*>(level.logits) + image * per_image;
  const int first = (static_cast<int>(blockIdx.x) - plan.first_chunk[l]) * kChunk;
  const int count = static_cast<int>(min(static_cast<long long>(kChunk), static_cast<long long>(per_image - first)));
  const std::int64_t list = static_cast<std::int64_t>(image) * gridDim.x + blockIdx.x;
  Key* const keys = buffers.keys + list * top_n;

  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  // Once `found` exceeds top_n its exact value no longer matters, because the survivors are then selected below.
  visit_survivors(logits + first, count, plan.logit_threshold, [&](int offset) {
    if (*static_cast<volatile int*>(&found) > top_n) return;
    const Key key = candidate_key(plan, level, logits, image, first + offset);
    if (key == 0) return;
    const int place = atomicAdd(&found, 1);
    if (place < top_n) keys[place] = key;
  });
  __syncthreads();
  const int survivors = found;
  __syncthreads();

  if (survivors > top_n) {
    const auto visit = [&](const auto& f) {
      for (int i = threadIdx.x; i < count; i += kFindThreads) {
        const Key key = candidate_key(plan, level, logits, image, first + i);
        if (key != 0) f(key);
      }
    };
    const Key cut = cut_key<kFindThreads>(visit, top_n, scratch);
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    visit([&](Key key) {
      if (key < cut) return;
      const int place = atomicAdd(&found, 1);
      if (place < top_n) keys[place] = key;
    });
  }
  if (threadIdx.x == 0) buffers.counts[list] = min(survivors, top_n);
}

/// Decodes the candidate of `key` into row `row` of the outputs.
__device__ void write_row(const Plan& plan, const DecodeLevel& level, int image, Key key, std::int64_t row,
                          float* scores, float* boxes, std::int32_t* classes) {
  const DecodeParams& p = plan.params;
  const int cells = level.height * level.width, index = static_cast<int>(key_index(key));
  const int channel = index / cells, cell = index % cells, anchor = channel / p.classes;
  const int x = cell % level.width * level.stride, y = cell / level.width * level.stride;
  const float* const base = level.anchors + static_cast<std::int64_t>(anchor) * p.anchor_values;
  const Box placed = {base[0] + static_cast<float>(x), base[1] + static_cast<float>(y),
                      base[2] + static_cast<float>(x), base[3] + static_cast<float>(y)};
  const int image_width = level.width * level.stride, image_height = level.height * level.stride;

  float values[6];
  const int count = box_values(p.coder);  // a center-ness is in the score already
#pragma unroll
  for (int v = 0; v < 6; ++v) values[v] = v < count ? head_value(p, level, image, anchor, v, cell) : 0.0f;
  scores[row] = key_score(key);
  classes[row] = channel % p.classes;
  decode_box(p.coder, values, placed, level.stride, image_width, image_height, boxes + row * count);
}

/// grid (L, N).
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_candidates(const Plan plan, const Buffers buffers, float* scores, float* boxes, std::int32_t* classes) {
  __shared__ SelectScratch<kMergeThreads> scratch;
  __shared__ Key best[kMaxTopN];
  __shared__ int found;

  const DecodeParams& p = plan.params;
  const int l = blockIdx.x, image = blockIdx.y;
  const DecodeLevel& level = p.level[l];
  const int lists = plan.first_chunk[l + 1] - plan.first_chunk[l];
  const std::int64_t first = static_cast<std::int64_t>(image) * plan.first_chunk[p.levels] + plan.first_chunk[l];
  const std::int32_t* const counts = buffers.counts + first;
  const Key* const keys = buffers.keys + first * p.top_n;

  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  int own = 0;
  for (int list = threadIdx.x; list < lists; list += kMergeThreads) own += counts[list];
  if (own > 0) atomicAdd(&found, own);
  __syncthreads();
  const int total = found;
  __syncthreads();

  // 32 neighboring threads go through one list together.
  const auto visit = [&](const auto& f) {
    for (int list = threadIdx.x / 32; list < lists; list += kMergeThreads / 32) {
      const Key* const start = keys + static_cast<std::int64_t>(list) * p.top_n;
      for (int i = threadIdx.x % 32; i < counts[list]; i += 32) f(start[i]);
    }
  };
  const Key cut = total > p.top_n ? cut_key<kMergeThreads>(visit, p.top_n, scratch) : 1;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  visit([&](Key key) {
    if (key < cut) return;
    const int place = atomicAdd(&found, 1);
    if (place < kMaxTopN) best[place] = key;
  });
  const int kept = min(total, p.top_n);
  if (kept > 0) sort_descending<kMergeThreads>(best, kept);

  const int columns = (l + 1 < p.levels ? plan.first_column[l + 1] : plan.columns) - plan.first_column[l];
  const int values = box_values(p.coder);
  const std::int64_t first_row = static_cast<std::int64_t>(image) * plan.columns + plan.first_column[l];
  for (int i = threadIdx.x; i < columns; i += kMergeThreads) {
    const std::int64_t row = first_row + i;
    if (i < kept) {
      write_row(plan, level, image, best[i], row, scores, boxes, classes);
      continue;
    }
    scores[row] = 0.0f;
    classes[row] = 0;
    for (int v = 0; v < values; ++v) boxes[row * values + v] = 0.0f;
  }
}

}  // namespace

std::int32_t decode_columns(const DecodeParams& p, int l) {
  const std::int64_t candidates = static_cast<std::int64_t>(p.anchors) * p.classes * p.level[l].height * p.level[l].width;
  return static_cast<std::int32_t>(std::min<std::int64_t>(p.top_n, candidates));
}

std::int32_t decode_columns(const DecodeParams& p) {
  std::int32_t columns = 0;
  for (int l = 0; l < p.levels; ++l) columns += decode_columns(p, l);
  return columns;
}

std::size_t decode_workspace(const DecodeParams& params) {
  Workspace workspace;
  carve(make_plan(params), workspace);
  return workspace.size();
}

void decode(const DecodeParams& params, float* scores, float* boxes, std::int32_t* classes, void* workspace,
            std::size_t workspace_bytes, cudaStream_t stream) {
  const Plan plan = make_plan(params);
  for (int l = 0; l < params.levels; ++l) {
    const DecodeLevel& level = params.level[l];
    require(level.logits && level.boxes && level.anchors, "logits, boxes and anchors must be given");
  }
  require(scores && boxes && classes && workspace, "the outputs and the workspace must be given");
  Workspace pieces(workspace);
  const Buffers buffers = carve(plan, pieces);
  require(pieces.size() <= workspace_bytes, "the workspace is smaller than decode_workspace() requires");

  const dim3 chunks(plan.first_chunk[params.levels], params.batch), lists(params.levels, params.batch);
  const auto find = params.logits_type == DataType::kHalf ? find_candidates<__half> : find_candidates<float>;
  launch(find, chunks, dim3(kFindThreads), stream, plan, buffers);
  launch(merge_candidates, lists, dim3(kMergeThreads), stream, plan, buffers, scores, boxes, classes);
}

}  // namespace odtk
