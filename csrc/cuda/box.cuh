// The geometry of boxes, for host and device, so that the CPU tests run the code that the kernels run.
//
// Includes the standard library and box_coder.h only: g++ compiles it without CUDA.
//
// The convention is that of odtk/boxes.py: x1, y1, x2, y2 in pixels, inclusive corners (width = x2 - x1 + 1); an angle
// turns counterclockwise as seen on the screen (y down). Every expression keeps the order of operations of
// odtk/boxes.py, and what includes this file is compiled without fused multiply-add, so that fp32 results have the same
// bits as torch's.
#pragma once

#include <cfloat>
#include <cmath>

#include "box_coder.h"

#ifdef __CUDACC__
#define ODTK_HD __host__ __device__ inline
#else
#define ODTK_HD inline
#endif

namespace odtk {

constexpr float kSmallestArea = 1e-9f;  ///< px^2, avoids 0 / 0 in the IoU of boxes without area
constexpr float kLongest = 1e4f;        ///< cap of a regressed sine or cosine of a doubled angle: its square is finite
constexpr float kBoundSlack = 1e-4f;    ///< allows for the rounding of iou_bound

struct Box {
  float x1, y1, x2, y2;
};

/// The un-rotated box, and the sine and cosine of its angle as they were regressed, which need not be normalized.
struct RotatedBox {
  Box box;
  float sin, cos;
};

template <typename T>
struct Point {
  T x, y;
};

// ---- scalars ----

template <typename T>
ODTK_HD T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
ODTK_HD T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
ODTK_HD T clamp(T value, T low, T high) {
  return smaller(larger(value, low), high);
}
template <typename T>
ODTK_HD T magnitude(T value) {
  return value < 0 ? -value : value;
}
/// a / b, and 0 where b is 0.
template <typename T>
ODTK_HD T ratio(T a, T b) {
  return b == 0 ? T(0) : a / b;
}
/// In fp64, so that a score, rounded once, has the same bits on every device, and equal scores tie on all of them.
ODTK_HD double sigmoid(float logit) { return 1.0 / (1.0 + exp(-static_cast<double>(logit))); }

// ---- decoding ----

ODTK_HD float width(const Box& b) { return b.x2 - b.x1 + 1.0f; }
ODTK_HD float height(const Box& b) { return b.y2 - b.y1 + 1.0f; }

/// A corner clamped to [0, size - 1]; NaN becomes 0.
ODTK_HD float clamp_corner(float value, int size) {
  return value != value ? 0.0f : clamp(value, 0.0f, static_cast<float>(size - 1));
}
ODTK_HD Box clamp(const Box& b, int image_width, int image_height) {
  return {clamp_corner(b.x1, image_width), clamp_corner(b.y1, image_height), clamp_corner(b.x2, image_width),
          clamp_corner(b.y2, image_height)};
}

/// (dx, dy, dw, dh) against an anchor: R-CNN, https://arxiv.org/abs/1311.2524, appendix C.
ODTK_HD Box decode_deltas(const float* deltas, const Box& anchor, int image_width, int image_height) {
  const float w = width(anchor), h = height(anchor);
  const float cx = deltas[0] * w + (anchor.x1 + 0.5f * w);
  const float cy = deltas[1] * h + (anchor.y1 + 0.5f * h);
  const float half_w = 0.5f * (expf(deltas[2]) * w);
  const float half_h = 0.5f * (expf(deltas[3]) * h);
  return clamp({cx - half_w, cy - half_h, cx + half_w - 1.0f, cy + half_h - 1.0f}, image_width, image_height);
}

/// (l, t, r, b) in strides, before ReLU, about the anchor's center: FCOS, https://arxiv.org/abs/1904.01355, eq. 1.
ODTK_HD Box decode_distances(const float* distances, const Box& anchor, int stride, int image_width, int image_height) {
  const float cx = anchor.x1 + 0.5f * width(anchor), cy = anchor.y1 + 0.5f * height(anchor);
  float pixels[4];
  for (int i = 0; i < 4; ++i) pixels[i] = (distances[i] < 0.0f ? 0.0f : distances[i]) * static_cast<float>(stride);
  return clamp({cx - pixels[0], cy - pixels[1], cx + pixels[2] - 1.0f, cy + pixels[3] - 1.0f}, image_width,
               image_height);
}

/// A sine or cosine as regressed, made finite: NaN becomes 0, infinity the largest finite number.
ODTK_HD float finite(float value) { return value != value ? 0.0f : clamp(value, -FLT_MAX, FLT_MAX); }

/// A value clamped to [low, high]; NaN becomes 0.
ODTK_HD float clamp_number(float value, float low, float high) { return value != value ? 0.0f : clamp(value, low, high); }

/// (dx, dy, w, h) in strides, from the anchor's center to that of a rotated box, which may reach beyond the image.
ODTK_HD Box decode_center_size(const float* values, const Box& anchor, int stride, int image_width, int image_height) {
  const float s = static_cast<float>(stride), image_w = static_cast<float>(image_width);
  const float image_h = static_cast<float>(image_height), longest = static_cast<float>(image_width + image_height);
  const float cx = clamp_number(anchor.x1 + 0.5f * width(anchor) + values[0] * s, 0.0f, image_w);
  const float cy = clamp_number(anchor.y1 + 0.5f * height(anchor) + values[1] * s, 0.0f, image_h);
  const float half_w = 0.5f * clamp_number(values[2] * s, 0.0f, longest);
  const float half_h = 0.5f * clamp_number(values[3] * s, 0.0f, longest);
  return {cx - half_w, cy - half_h, cx + half_w - 1.0f, cy + half_h - 1.0f};
}

/// The sine and cosine, of unknown length, of an angle in [-pi/4, 3pi/4] from those of twice the angle, of any length:
/// tan a = sin 2a / (1 + cos 2a) = (1 - cos 2a) / sin 2a, of which each branch takes the one without cancellation.
ODTK_HD void halve_angle(float sin_twice, float cos_twice, float* sine, float* cosine) {
  const float s = clamp_number(sin_twice, -kLongest, kLongest), c = clamp_number(cos_twice, -kLongest, kLongest);
  const float length = sqrtf(s * s + c * c);
  *sine = c < 0.0f ? length - c : s;
  *cosine = c < 0.0f ? s : length + c;
}

/// Decodes the first box_values(coder) of a head's `values` at a placed anchor into as many numbers of `box`.
ODTK_HD void decode_box(BoxCoder coder, const float* values, const Box& anchor, int stride, int image_width,
                        int image_height, float* box) {
  Box corners{};
  switch (coder) {
    case BoxCoder::kAnchorDeltas:
    case BoxCoder::kRotatedDeltas: corners = decode_deltas(values, anchor, image_width, image_height); break;
    case BoxCoder::kDistancesCenterness:
    case BoxCoder::kDistances:
      corners = decode_distances(values, anchor, stride, image_width, image_height);
      break;
    case BoxCoder::kCenterSizeAngle:
      corners = decode_center_size(values, anchor, stride, image_width, image_height);
      halve_angle(values[4], values[5], box + 4, box + 5);
      break;
  }
  box[0] = corners.x1;
  box[1] = corners.y1;
  box[2] = corners.x2;
  box[3] = corners.y2;
  if (coder == BoxCoder::kRotatedDeltas) {
    box[4] = finite(values[4]);
    box[5] = finite(values[5]);
  }
}

// ---- IoU of axis-aligned boxes ----

/// Area in px^2; 0 where a side is not positive.
ODTK_HD float area(const Box& b) { return larger(width(b), 0.0f) * larger(height(b), 0.0f); }

/// Intersection over union in [0, 1]; 0 without area.
ODTK_HD float iou(const Box& a, const Box& b) {
  const float w = larger(smaller(a.x2, b.x2) - larger(a.x1, b.x1) + 1.0f, 0.0f);
  const float h = larger(smaller(a.y2, b.y2) - larger(a.y1, b.y1) + 1.0f, 0.0f);
  const float intersection = w * h;
  return intersection / larger(area(a) + area(b) - intersection, kSmallestArea);
}

// ---- IoU of rotated boxes ----

/// The normalized sine and cosine of a rotated box; (0, 1) if both were regressed as 0.
template <typename T>
ODTK_HD void unit_rotation(const RotatedBox& b, T* sine, T* cosine) {
  // Divided by the larger of the two before squaring, so that nothing overflows.
  const T s = b.sin, c = b.cos, scale = larger(magnitude(s), magnitude(c));
  if (scale == 0) {
    *sine = 0;
    *cosine = 1;
    return;
  }
  const T length = sqrt((s / scale) * (s / scale) + (c / scale) * (c / scale));
  *sine = s / scale / length;
  *cosine = c / scale / length;
}

/// An upper bound of the IoU of two rotated boxes: their intersection is at most the smaller area, and at most the
/// intersection of their circumscribed axis-aligned boxes. It is 0 only if they do not overlap.
ODTK_HD float iou_bound(const RotatedBox& a, const RotatedBox& b) {
  float sine[2], cosine[2];
  unit_rotation(a, &sine[0], &cosine[0]);
  unit_rotation(b, &sine[1], &cosine[1]);
  const RotatedBox* boxes[2] = {&a, &b};
  float low_x = -FLT_MAX, low_y = -FLT_MAX, high_x = FLT_MAX, high_y = FLT_MAX;
  for (int i = 0; i < 2; ++i) {
    const float w = width(boxes[i]->box), h = height(boxes[i]->box), s = magnitude(sine[i]), c = magnitude(cosine[i]);
    const float cx = boxes[i]->box.x1 + 0.5f * w, cy = boxes[i]->box.y1 + 0.5f * h;
    const float half_w = larger(0.5f * (c * w + s * h), 0.0f), half_h = larger(0.5f * (c * h + s * w), 0.0f);
    low_x = larger(low_x, cx - half_w);
    low_y = larger(low_y, cy - half_h);
    high_x = smaller(high_x, cx + half_w);
    high_y = smaller(high_y, cy + half_h);
  }
  const float area_a = area(a.box), area_b = area(b.box);
  const float around = larger(high_x - low_x, 0.0f) * larger(high_y - low_y, 0.0f);
  const float most = smaller(around, smaller(area_a, area_b));
  return most > 0.0f ? most / larger(area_a + area_b - most, kSmallestArea) : 0.0f;
}

/// The integral of clamp(x, -w, w) dy along the part of the edge from `p` to `q` where |y| <= h.
template <typename T>
ODTK_HD T edge_in_rectangle(const Point<T>& p, const Point<T>& q, T w, T h) {
  const T start = clamp(p.y, -h, h), end = clamp(q.y, -h, h);
  const T slope = ratio(q.x - p.x, q.y - p.y);
  const T x0 = p.x + slope * (start - p.y), x1 = p.x + slope * (end - p.y);
  // clamp(x, -w, w) is linear between the parameters where x passes -w and w: trapezia are exact.
  const T enter = clamp(ratio(-w - x0, x1 - x0), T(0), T(1)), leave = clamp(ratio(w - x0, x1 - x0), T(0), T(1));
  const T first = smaller(enter, leave), second = larger(enter, leave);
  const T v0 = clamp(x0, -w, w), v1 = clamp(x0 + first * (x1 - x0), -w, w);
  const T v2 = clamp(x0 + second * (x1 - x0), -w, w), v3 = clamp(x1, -w, w);
  const T mean = T(0.5) * (first * (v0 + v1) + (second - first) * (v1 + v2) + (T(1) - second) * (v2 + v3));
  return (end - start) * mean;
}

/// The exact intersection over union in [0, 1] of the polygons of two rotated boxes, computed in T.
///
/// Seen from b, as the rectangle |x| <= w, |y| <= h, the area of the intersection is by Green's theorem the integral of
/// clamp(x, -w, w) dy along those parts of a's four edges where |y| <= h: no list of intersection points, no sorting,
/// and identical boxes, shared edges and touching corners are not special.
template <typename T>
ODTK_HD T rotated_iou(const RotatedBox& a, const RotatedBox& b) {
  const T width_a = larger(T(a.box.x2) - T(a.box.x1) + 1, T(0)), height_a = larger(T(a.box.y2) - T(a.box.y1) + 1, T(0));
  const T width_b = larger(T(b.box.x2) - T(b.box.x1) + 1, T(0)), height_b = larger(T(b.box.y2) - T(b.box.y1) + 1, T(0));
  // The center of a relative to that of b: half of (x1 + x2 + 1) - (x1' + x2' + 1).
  const T cx = T(0.5) * ((T(a.box.x1) - T(b.box.x1)) + (T(a.box.x2) - T(b.box.x2)));
  const T cy = T(0.5) * ((T(a.box.y1) - T(b.box.y1)) + (T(a.box.y2) - T(b.box.y2)));
  T sin_a, cos_a, sin_b, cos_b;
  unit_rotation(a, &sin_a, &cos_a);
  unit_rotation(b, &sin_b, &cos_b);

  Point<T> corner[4];  // of a, relative to b's center, turned back by b's angle
  for (int i = 0; i < 4; ++i) {
    const T dx = T(0.5) * (i == 1 || i == 2 ? width_a : -width_a), dy = T(0.5) * (i >= 2 ? height_a : -height_a);
    const T x = cos_a * dx + sin_a * dy + cx, y = cos_a * dy - sin_a * dx + cy;
    corner[i] = {cos_b * x - sin_b * y, sin_b * x + cos_b * y};
  }
  T inside = 0;
  for (int i = 0; i < 4; ++i) {
    inside += edge_in_rectangle(corner[i], corner[(i + 1) % 4], T(0.5) * width_b, T(0.5) * height_b);
  }
  inside = magnitude(inside);
  return inside / larger(width_a * height_a + width_b * height_b - inside, T(kSmallestArea));
}

/// rotated_iou, but 0 for pairs whose IoU is certain to be below `minimum`.
ODTK_HD float rotated_iou(const RotatedBox& a, const RotatedBox& b, float minimum) {
  const float bound = iou_bound(a, b);
  return bound > 0.0f && bound > minimum - kBoundSlack ? static_cast<float>(rotated_iou<double>(a, b)) : 0.0f;
}

// ---- the test of the NMS ----

/// Whether the IoU is strictly above the threshold.
ODTK_HD bool overlaps(const Box& a, const Box& b, float threshold) { return iou(a, b) > threshold; }

ODTK_HD bool overlaps(const RotatedBox& a, const RotatedBox& b, float threshold) {
  constexpr float kDoubtful = 1e-3f;  // fp32 is off by less than this; nearer, fp64 decides, which small GPUs do slowly
  const float bound = iou_bound(a, b);
  if (bound <= 0.0f || bound <= threshold - kBoundSlack) return false;
  const float quick = rotated_iou<float>(a, b);
  if (magnitude(quick - threshold) > kDoubtful) return quick > threshold;
  return static_cast<float>(rotated_iou<double>(a, b)) > threshold;
}

}  // namespace odtk
