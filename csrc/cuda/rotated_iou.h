// rotated_iou: the exact IoU of all pairs of two lists of rotated boxes, for target assignment and evaluation.
//
// May not include torch or TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace odtk {

struct RotatedIouParams {
  std::int32_t batch = 1;     ///< B
  std::int32_t a_count = 0;   ///< N, boxes in a, per entry of the batch
  std::int32_t b_count = 0;   ///< M, boxes in b, per entry of the batch
  std::int32_t a_values = 5;  ///< 5: x1, y1, x2, y2, theta; 6: x1, y1, x2, y2, sin, cos (need not be normalized)
  std::int32_t b_values = 5;  ///< the same for b
  bool a_shared = false;      ///< a is [N, a_values], the same for the whole batch, instead of [B, N, a_values]
  bool b_shared = false;      ///< the same for b
  float minimum = 0.0f;       ///< a pair whose IoU is certain to be below this gets 0, which saves most of the work
};

/// Enqueues iou [B, N, M] fp32 of a [B, N, a_values] and b [B, M, b_values] fp32 on `stream`. All are device memory; it
/// needs no workspace. Every element is written; nothing is done if B*N*M is 0.
/// Throws std::invalid_argument for bad params and CudaError if the launch is refused.
void rotated_iou(const RotatedIouParams& params, const float* a, const float* b, float* iou, cudaStream_t stream);

/// The same with host memory, on the calling thread.
void rotated_iou_host(const RotatedIouParams& params, const float* a, const float* b, float* iou);

}  // namespace odtk
