// decode: the raw head tensors of all levels, for a whole batch -> the best candidates of each image and level.
//
// May not include torch or TensorRT. Always two kernel launches, however many images and levels there are; no host
// synchronization, no allocation, no host-to-device copy; can be captured in a CUDA graph; the same bits at every run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "box_coder.h"

namespace odtk {

constexpr int kMaxLevels = 16;   ///< levels of one call (three concatenated five-level pyramids)
constexpr int kMaxTopN = 4096;   ///< the largest DecodeParams::top_n

enum class DataType : std::int32_t { kFloat = 0, kHalf = 1 };

/// One level of the pyramid. The pointers are device pointers, the tensors dense in one of two layouts:
///
/// NCHW (pitch 0): logits [N, A*C, h, w], boxes [N, A*V, h, w], where V is head_values(coder).
/// Channels-last (pitch > 0): [N, h, w, pitch] with pitch >= channels. Channels beyond A*C (or A*V) are padding that is
/// never interpreted. In TensorRT's kHWC the pitch is the number of channels, in kHWC8 its next multiple of 8.
struct DecodeLevel {
  const void* logits = nullptr;    ///< class logits; channel a*C + c
  const void* boxes = nullptr;     ///< box head; channel a*V + v
  const float* anchors = nullptr;  ///< anchors [A, anchor_values] of cell (0, 0), px: x1, y1, x2, y2, theta (ignored)
  std::int32_t height = 0;         ///< h, cells
  std::int32_t width = 0;          ///< w, cells
  std::int32_t stride = 0;         ///< pixels per cell
  std::int32_t logits_pitch = 0;   ///< 0: NCHW; otherwise channels-last with this many elements per cell
  std::int32_t boxes_pitch = 0;    ///< the same for boxes
};

/// The parameters of one call. Small enough (about 1 KiB) to be passed as a kernel parameter.
struct DecodeParams {
  std::int32_t batch = 0;          ///< N, 1 .. 65535
  std::int32_t levels = 0;         ///< L, 1 .. kMaxLevels
  std::int32_t anchors = 0;        ///< A, anchors per cell, the same in all levels
  std::int32_t classes = 0;        ///< C
  std::int32_t top_n = 1000;       ///< K, candidates kept per image and level, 1 .. kMaxTopN
  std::int32_t anchor_values = 4;  ///< the length of a row of DecodeLevel::anchors: 4 or 5
  double score_threshold = 0.05;   ///< t: a candidate survives if its logit > log(t / (1 - t)), rounded to fp32
  BoxCoder coder = BoxCoder::kAnchorDeltas;
  DataType logits_type = DataType::kFloat;
  DataType boxes_type = DataType::kFloat;
  DecodeLevel level[kMaxLevels];
};

/// The columns of the output that level `l` fills: min(K, A*C*h*w). Level 0 comes first.
std::int32_t decode_columns(const DecodeParams& params, int l);
/// The columns of the whole output: the sum over the levels.
std::int32_t decode_columns(const DecodeParams& params);

/// Bytes of scratch memory that decode() needs; never less for a larger batch, map or top_n. Pointers may be null here.
/// Throws std::invalid_argument that names the field for params that decode() would refuse.
std::size_t decode_workspace(const DecodeParams& params);

/// Enqueues the decoding on `stream`.
///
/// For each image and level it writes the K best survivors by descending score. Among equal scores the lower index
/// ((a*C + c)*h + y)*w + x comes first. Rows after the last survivor are zero, and NaN logits never survive. Every
/// element of the outputs is written.
///
///   scores   [N, columns]                     fp32: sigmoid(logit), or with a center-ness
///                                             sqrt(sigmoid(logit) * sigmoid(center-ness logit))
///   boxes    [N, columns, box_values(coder)]  fp32, pixels of the network's input, inclusive corners
///   classes  [N, columns]                     int32, 0 .. C-1
///
/// `workspace` is device memory of at least decode_workspace(params) bytes, aligned to Workspace::kAlignment; nothing
/// is kept in it between calls. Throws std::invalid_argument for bad params and CudaError if a launch is refused.
void decode(const DecodeParams& params, float* scores, float* boxes, std::int32_t* classes, void* workspace,
            std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace odtk
