// nms: greedy non-maximum suppression per class, for a whole batch in one launch.
//
// May not include torch or TensorRT. No host synchronization, no allocation, no host-to-device copy; can be captured in
// a CUDA graph; the same bits at every run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace odtk {

struct NmsParams {
  std::int32_t batch = 0;         ///< N, 1 .. 65535
  std::int32_t count = 0;         ///< M, candidates per image (decode's columns), >= 1
  std::int32_t detections = 100;  ///< D, rows per image in the output, >= 1
  std::int32_t box_values = 4;    ///< 4: x1, y1, x2, y2; 6: also sin, cos, and the IoU is that of the rotated polygons
  float threshold = 0.5f;         ///< a box goes if its IoU with a better one of its class is strictly above this
};

/// Bytes of scratch memory that nms() needs; never less for a larger batch or count.
/// Throws std::invalid_argument that names the field for params that nms() would refuse.
std::size_t nms_workspace(const NmsParams& params);

/// Enqueues the suppression on `stream`.
///
/// In:  scores [N, M] fp32 (a row takes part if its score > 0), boxes [N, M, box_values] fp32, classes [N, M] int32.
/// Out: scores [N, D], boxes [N, D, box_values] and classes [N, D], by descending score; among equal scores the lower
/// index comes first. Unused rows are zero. Every element is written. Inputs and outputs must not overlap.
///
/// `workspace` is as for decode(): at least nms_workspace(params) bytes. Throws as decode() does.
void nms(const NmsParams& params, const float* scores, const float* boxes, const std::int32_t* classes, float* out_scores,
         float* out_boxes, std::int32_t* out_classes, void* workspace, std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace odtk
