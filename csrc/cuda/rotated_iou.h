// rotated_iou: exact IoU of all pairs of two lists of rotated boxes, for target assignment.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace odtk {

struct RotatedIouParams {
  std::int32_t batch = 1;     ///< B
  std::int32_t a_count = 0;   ///< N, boxes per batch entry in a
  std::int32_t b_count = 0;   ///< M
  std::int32_t a_values = 5;  ///< 5: x1, y1, x2, y2, theta; 6: x1, y1, x2, y2, sin, cos (of any common length)
  std::int32_t b_values = 5;
  bool a_shared = false;      ///< a is [N, values], the same for all of the batch, instead of [B, N, values]
  bool b_shared = false;
  float minimum = 0.0f;       ///< pairs whose IoU is surely below are given as 0, which saves most of the work
};

/// iou [B, N, M] fp32 of a [B, N, a_values] and b [B, M, b_values] fp32, all device memory; enqueued on `stream`, no
/// workspace. Every element is written; nothing is done where B*N*M is 0.
/// Throws std::invalid_argument for bad params, CudaError when the launch is refused.
void rotated_iou(const RotatedIouParams& params, const float* a, const float* b, float* iou, cudaStream_t stream);

/// The same on the host, on the calling thread.
void rotated_iou_host(const RotatedIouParams& params, const float* a, const float* b, float* iou);

}  // namespace odtk
