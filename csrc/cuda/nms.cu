// The kernel of nms.h: one launch, one block per image. May not include torch or TensorRT.
//
// The used candidates are sorted, then taken in tiles of 64, best first. Each box of a tile is compared with the boxes
// kept so far and with the others of the tile, all pairs in parallel, and the results are bit masks. Then one thread
// goes through the masks, one step per box kept, so an image takes at most D steps. It ends when D boxes are kept or no
// candidates are left.
#include "nms.h"

#include <stdexcept>
#include <string>

#include "box.cuh"
#include "launch.cuh"
#include "select.cuh"
#include "workspace.h"

namespace odtk {
namespace {

constexpr int kTile = 64;          // candidates per step: the bits of a mask
constexpr int kSharedKeys = 4096;  // if more candidates are used than this, they are sorted in global memory
using Mask = unsigned long long;

struct Input {
  const float* scores;
  const float* boxes;
  const std::int32_t* classes;
};

struct Output {
  float* scores;
  float* boxes;
  std::int32_t* classes;
};

struct Buffers {
  Key* keys;  // [N, padded_count(M)]
};

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("odtk::nms: ") + what);
}

void check(const NmsParams& p) {
  require(p.batch >= 1 && p.batch <= 65535, "batch must be 1 to 65535");
  require(p.count >= 1 && p.count <= 1 << 24, "count must be 1 to 2^24");
  require(p.detections >= 1 && p.detections <= 1 << 24, "detections must be 1 to 2^24");
  require(p.box_values == 4 || p.box_values == 6, "box_values must be 4 or 6");
}

Buffers carve(const NmsParams& p, Workspace& workspace) {
  return {workspace.take<Key>(static_cast<std::size_t>(p.batch) * padded_count(p.count))};
}

template <int kValues>
struct BoxOf;
template <>
struct BoxOf<4> {
  using Type = Box;
  static constexpr int kThreads = 1024;
  __device__ static Box load(const float* v) { return {v[0], v[1], v[2], v[3]}; }
};
template <>
struct BoxOf<6> {
  using Type = RotatedBox;
  static constexpr int kThreads = 512;  // fewer, because the polygons' IoU needs more registers
  __device__ static RotatedBox load(const float* v) { return {{v[0], v[1], v[2], v[3]}, v[4], v[5]}; }
};

/// grid (N).
template <int kValues>
__global__ void __launch_bounds__(BoxOf<kValues>::kThreads)
    suppress(const NmsParams p, const Input in, const Output out, const Buffers buffers) {
  using Load = BoxOf<kValues>;
  constexpr int kThreads = Load::kThreads, kGroups = kThreads / kTile;
  __shared__ Key shared_keys[kSharedKeys];
  __shared__ int sums[kThreads];
  __shared__ float tile_boxes[kTile][kValues];
  __shared__ float tile_scores[kTile];
  __shared__ std::int32_t tile_classes[kTile];
  __shared__ Mask suppressed_by[kTile];  // for each box of the tile, the later ones that it suppresses
  __shared__ Mask dead;                  // the boxes that those kept before this tile suppress
  __shared__ int chosen[kTile];          // the boxes of the tile that are kept
  __shared__ int kept_after;

  const int thread = threadIdx.x;
  const std::int64_t image = blockIdx.x, first_in = image * p.count, first_out = image * p.detections;

  // The keys of the used candidates; each thread writes its own after those of the threads before it.
  int own = 0;
  for (int i = thread; i < p.count; i += kThreads) own += in.scores[first_in + i] > 0.0f;
  const int through = inclusive_scan<kThreads>(own, sums), used = sums[kThreads - 1];
  Key* const keys = used <= kSharedKeys ? shared_keys : buffers.keys + image * padded_count(p.count);
  for (int i = thread, place = through - own; i < p.count; i += kThreads) {
    const float score = in.scores[first_in + i];
    if (score > 0.0f) keys[place++] = make_key(score, i);
  }
  if (used > 0) sort_descending<kThreads>(keys, used);

  int kept = 0;
  for (int start = 0; start < used && kept < p.detections; start += kTile) {
    const int size = min(kTile, used - start);
    if (thread < kTile) suppressed_by[thread] = 0;
    if (thread == 0) dead = 0;
    if (thread < size) {
      const Key key = keys[start + thread];
      const std::int64_t row = first_in + key_index(key);
      tile_scores[thread] = key_score(key);
      tile_classes[thread] = in.classes[row];
      for (int v = 0; v < kValues; ++v) tile_boxes[thread][v] = in.boxes[row * kValues + v];
    }
    __syncthreads();

    const int column = thread % kTile, group = thread / kTile;
    if (column < size) {
      const auto box = Load::load(tile_boxes[column]);
      const std::int32_t label = tile_classes[column];
      for (int k = group; k < kept; k += kGroups) {
        const std::int64_t row = first_out + k;
        if (out.classes[row] == label && overlaps(Load::load(out.boxes + row * kValues), box, p.threshold)) {
          atomicOr(&dead, Mask{1} << column);
          break;
        }
      }
      for (int better = group; better < column; better += kGroups) {
        if (tile_classes[better] == label && overlaps(Load::load(tile_boxes[better]), box, p.threshold)) {
          atomicOr(&suppressed_by[better], Mask{1} << column);
        }
      }
    }
    __syncthreads();

    if (thread == 0) {
      Mask alive = (size == kTile ? ~Mask{0} : (Mask{1} << size) - 1) & ~dead;
      int count = kept;
      while (alive != 0 && count < p.detections) {
        const int best = __ffsll(static_cast<long long>(alive)) - 1;
        chosen[count++ - kept] = best;
        alive &= ~(suppressed_by[best] | Mask{1} << best);
      }
      kept_after = count;
    }
    __syncthreads();

    const int more = kept_after - kept;
    if (thread < more) {
      const int from = chosen[thread];
      const std::int64_t row = first_out + kept + thread;
      out.scores[row] = tile_scores[from];
      out.classes[row] = tile_classes[from];
      for (int v = 0; v < kValues; ++v) out.boxes[row * kValues + v] = tile_boxes[from][v];
    }
    kept += more;
    __syncthreads();  // next, all threads read these rows, and the tile is overwritten
  }

  for (int i = kept + thread; i < p.detections; i += kThreads) {
    const std::int64_t row = first_out + i;
    out.scores[row] = 0.0f;
    out.classes[row] = 0;
    for (int v = 0; v < kValues; ++v) out.boxes[row * kValues + v] = 0.0f;
  }
}

}  // namespace

std::size_t nms_workspace(const NmsParams& params) {
  check(params);
  Workspace workspace;
  carve(params, workspace);
  return workspace.size();
}

void nms(const NmsParams& params, const float* scores, const float* boxes, const std::int32_t* classes, float* out_scores,
         float* out_boxes, std::int32_t* out_classes, void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  check(params);
  require(scores && boxes && classes, "scores, boxes and classes must be given");
  require(out_scores && out_boxes && out_classes && workspace, "the outputs and the workspace must be given");
  Workspace pieces(workspace);
  const Buffers buffers = carve(params, pieces);
  require(pieces.size() <= workspace_bytes, "the workspace is smaller than nms_workspace() requires");

  const Input in{scores, boxes, classes};
  const Output out{out_scores, out_boxes, out_classes};
  if (params.box_values == 4) {
    launch(suppress<4>, dim3(params.batch), dim3(BoxOf<4>::kThreads), stream, params, in, out, buffers);
  } else {
    launch(suppress<6>, dim3(params.batch), dim3(BoxOf<6>::kThreads), stream, params, in, out, buffers);
  }
}

}  // namespace odtk
