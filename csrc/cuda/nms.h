// nms: greedy non-maximum suppression per class, for a whole batch in one launch.
//
// Torch-free, TensorRT-free. No host synchronization, no allocation, no host-to-device copy; capturable in a CUDA graph;
// the same bits at every run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace odtk {

struct NmsParams {
  std::int32_t batch = 0;         ///< N, 1 .. 65535
  std::int32_t count = 0;         ///< M, candidates per image (decode's columns), >= 1
  std::int32_t detections = 100;  ///< D, rows per image in the output, >= 1
  std::int32_t values = 4;        ///< numbers per box: 4 (x1, y1, x2, y2) or 6 (…, sin, cos: IoU of the rotated polygons)
  float threshold = 0.5f;         ///< a box is suppressed by a better one of its class at an IoU strictly above this
};

/// Bytes of scratch that nms() needs; never less for a larger batch or count.
/// Throws std::invalid_argument, with the field at fault, for params that nms() would refuse.
std::size_t nms_workspace(const NmsParams& params);

/// Enqueues the suppression on `stream`.
///
/// In:  scores [N, M] fp32 (a row takes part iff its score > 0), boxes [N, M, values] fp32, classes [N, M] int32.
/// Out: scores [N, D], boxes [N, D, values], classes [N, D] by falling score, ties by lower index; unused rows zero.
/// Every element of the outputs is written. In and out must not overlap.
///
/// `workspace` as for decode().
void nms(const NmsParams& params, const float* scores, const float* boxes, const std::int32_t* classes, float* out_scores,
         float* out_boxes, std::int32_t* out_classes, void* workspace, std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace odtk
