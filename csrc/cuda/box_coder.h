// What the numbers of a box head mean, under the names of odtk/box_coder.py.
//
// Plain C++ that includes nothing of CUDA, TensorRT or torch: kernels, plugins and bindings all read it.
#pragma once

#include <cstdint>

namespace odtk {

/// How the V numbers per anchor of the box head are decoded (odtk/boxes.py has the formulas).
///
/// The first box_values() of them make the box; a center-ness comes after them. The first three coders are numbered by
/// their head_values(), which is what the plugins of earlier engines stored in place of the coder; later ones count on
/// from 7.
enum class BoxCoder : std::int32_t {
  kAnchorDeltas = 4,         ///< dx, dy, dw, dh relative to an anchor             -> x1, y1, x2, y2
  kRotatedDeltas = 6,        ///< dx, dy, dw, dh, sin, cos of the box's own angle  -> x1, y1, x2, y2, sin, cos
  kDistancesCenterness = 5,  ///< l, t, r, b in strides, center-ness logit         -> x1, y1, x2, y2
  kDistances = 7,            ///< l, t, r, b in strides                            -> x1, y1, x2, y2
  kCenterSizeAngle = 8,      ///< dx, dy, w, h in strides, sin, cos of 2 angle     -> x1, y1, x2, y2, sin, cos
};

/// V, the numbers per anchor of the head; 0 for a number that is not of the enum.
constexpr int head_values(BoxCoder coder) {
  switch (coder) {
    case BoxCoder::kAnchorDeltas:
    case BoxCoder::kDistances: return 4;
    case BoxCoder::kRotatedDeltas:
    case BoxCoder::kCenterSizeAngle: return 6;
    case BoxCoder::kDistancesCenterness: return 5;
  }
  return 0;
}

/// The numbers of a decoded box.
constexpr int box_values(BoxCoder coder) {
  return coder == BoxCoder::kRotatedDeltas || coder == BoxCoder::kCenterSizeAngle ? 6 : 4;
}

/// Whether a center-ness logit follows the numbers of the box.
constexpr bool has_centerness(BoxCoder coder) { return head_values(coder) > box_values(coder); }

}  // namespace odtk
