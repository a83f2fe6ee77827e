// decode: raw head tensors of all levels of a whole batch -> the best candidates of each image and level.
//
// Torch-free, TensorRT-free. Two kernel launches whatever the batch, levels and data; no host synchronization, no
// allocation, no host-to-device copy; capturable in a CUDA graph; the same bits at every run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace odtk {

constexpr int kMaxLevels = 16;   ///< levels of one call (three concatenated five-level pyramids)
constexpr int kMaxTopN = 4096;   ///< largest DecodeParams::top_n

enum class DataType : std::int32_t { kFloat = 0, kHalf = 1 };

/// How the V numbers of the box head are read (odtk/boxes.py states the formulas).
enum class BoxKind : std::int32_t {
  kAnchor = 0,   ///< V = 4: dx, dy, dw, dh relative to an anchor        -> 4 numbers x1, y1, x2, y2
  kRotated = 1,  ///< V = 6: dx, dy, dw, dh, sin, cos of the box's angle -> 6 numbers x1, y1, x2, y2, sin, cos
  kFcos = 2,     ///< V = 5: l, t, r, b in strides, center-ness logit    -> 4 numbers x1, y1, x2, y2
};

/// Numbers per cell and anchor in the box head.
constexpr int head_values(BoxKind kind) { return kind == BoxKind::kAnchor ? 4 : kind == BoxKind::kRotated ? 6 : 5; }
/// Numbers per decoded box.
constexpr int box_values(BoxKind kind) { return kind == BoxKind::kRotated ? 6 : 4; }

/// One level of the pyramid. Device pointers; the tensors are dense in the layout named.
///
/// NCHW (pitch 0): logits [N, A*C, h, w], boxes [N, A*V, h, w].
/// Channels-last (pitch > 0): [N, h, w, pitch] with pitch >= channels; the channels beyond A*C (A*V) are padding that
/// is never interpreted (TensorRT's kHWC has pitch = channels, kHWC8 rounds it up to a multiple of 8).
struct DecodeLevel {
  const void* logits = nullptr;    ///< class logits; channel a*C + c
  const void* boxes = nullptr;     ///< box head; channel a*V + v
  const float* anchors = nullptr;  ///< base anchors [A, anchor_values]: x1, y1, x2, y2 (theta ignored) of cell (0, 0), pixels
  std::int32_t height = 0;         ///< h, cells
  std::int32_t width = 0;          ///< w, cells
  std::int32_t stride = 0;         ///< pixels per cell
  std::int32_t logits_pitch = 0;   ///< 0: NCHW; otherwise channels-last with this many elements per cell
  std::int32_t boxes_pitch = 0;
};

/// All of one call. Small enough (about 1 KiB) to travel as a kernel parameter.
struct DecodeParams {
  // Set by the caller.
  std::int32_t batch = 0;          ///< N, 1 .. 65535
  std::int32_t levels = 0;         ///< L, 1 .. kMaxLevels
  std::int32_t anchors = 0;        ///< A, per cell, the same in all levels
  std::int32_t classes = 0;        ///< C
  std::int32_t top_n = 1000;       ///< K, best candidates kept per image and level, 1 .. kMaxTopN
  std::int32_t anchor_values = 4;  ///< row length of DecodeLevel::anchors: 4 or 5
  double score_threshold = 0.05;   ///< t: a candidate survives iff logit > log(t / (1 - t)), rounded to fp32
  BoxKind kind = BoxKind::kAnchor;
  DataType logits_type = DataType::kFloat;
  DataType boxes_type = DataType::kFloat;
  DecodeLevel level[kMaxLevels];
};

/// Columns of the output of level `l`: min(K, A*C*h*w). Level 0 comes first.
std::int32_t decode_columns(const DecodeParams& params, int l);
/// Columns of the whole output: the sum over the levels.
std::int32_t decode_columns(const DecodeParams& params);

/// Bytes of scratch that decode() needs; never less for a larger batch, map or top_n. Pointers may be null here.
/// Throws std::invalid_argument, with the field at fault, for params that decode() would refuse.
std::size_t decode_workspace(const DecodeParams& params);

/// Enqueues the decoding on `stream`.
///
/// Per image and level the K best survivors, by falling score, ties by lower flat index ((a*C + c)*h + y)*w + x; rows
/// beyond the last survivor are zero. NaN logits never survive. Every element of the outputs is written.
///
///   scores   [N, columns]                     fp32: sigmoid(logit); kFcos: sqrt(sigmoid(logit) * sigmoid(center-ness))
///   boxes    [N, columns, box_values(kind)]   fp32, pixels of the network's input, inclusive corners
///   classes  [N, columns]                     int32, 0 .. C-1
///
/// `workspace` is device memory of at least decode_workspace(params) bytes, aligned to Workspace::kAlignment; nothing is
/// kept in it between calls. Throws std::invalid_argument for bad params, CudaError when a launch is refused.
void decode(const DecodeParams& params, float* scores, float* boxes, std::int32_t* classes, void* workspace,
            std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace odtk
