// The kernel of rotated_iou.h, and the same on the host. May not include torch or TensorRT.
#include "rotated_iou.h"

#include <algorithm>
#include <stdexcept>

#include "box.cuh"
#include "launch.cuh"

namespace odtk {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 16;

void check(const RotatedIouParams& p) {
  for (const std::int32_t values : {p.a_values, p.b_values}) {
    if (values != 5 && values != 6) throw std::invalid_argument("odtk::rotated_iou: a box must have 5 or 6 values");
  }
  if (p.batch < 0 || p.a_count < 0 || p.b_count < 0) {
    throw std::invalid_argument("odtk::rotated_iou: batch, a_count and b_count must not be negative");
  }
}

ODTK_HD RotatedBox load(const float* boxes, std::int64_t row, int values) {
  const float* const v = boxes + row * values;
  if (values == 6) return {{v[0], v[1], v[2], v[3]}, v[4], v[5]};
  return {{v[0], v[1], v[2], v[3]}, sinf(v[4]), cosf(v[4])};
}

/// Element `at` of iou [B, N, M].
ODTK_HD float pair_iou(const RotatedIouParams& p, const float* a, const float* b, std::int64_t at) {
  const std::int64_t batch = at / p.b_count / p.a_count, n = at / p.b_count % p.a_count, m = at % p.b_count;
  return rotated_iou(load(a, (p.a_shared ? 0 : batch * p.a_count) + n, p.a_values),
                     load(b, (p.b_shared ? 0 : batch * p.b_count) + m, p.b_values), p.minimum);
}

std::int64_t pairs(const RotatedIouParams& p) { return std::int64_t{p.batch} * p.a_count * p.b_count; }

__global__ void __launch_bounds__(kThreads)
    all_pairs(const RotatedIouParams p, const float* a, const float* b, float* iou, std::int64_t total) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < total; at += step) {
    iou[at] = pair_iou(p, a, b, at);
  }
}

}  // namespace

void rotated_iou(const RotatedIouParams& params, const float* a, const float* b, float* iou, cudaStream_t stream) {
  check(params);
  const std::int64_t total = pairs(params);
  if (total == 0) return;
  const std::int64_t blocks = std::min(kMaxBlocks, (total + kThreads - 1) / kThreads);
  launch(all_pairs, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, params, a, b, iou, total);
}

void rotated_iou_host(const RotatedIouParams& params, const float* a, const float* b, float* iou) {
  check(params);
  const std::int64_t total = pairs(params);
  for (std::int64_t at = 0; at < total; ++at) iou[at] = pair_iou(params, a, b, at);
}

}  // namespace odtk
