// DeepStream's parser for models that odtk exported: their outputs scores, boxes and classes → objects for nvinfer.
//
// The contract is that of nvdsinfer_custom_impl.h: nvinfer calls it for each frame with the layers' buffers in the CPU's
// memory. Boxes are in pixels of the network's input; nvinfer scales them back to the frame.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "nvdsinfer_custom_impl.h"

namespace {

const NvDsInferLayerInfo *find(std::vector<NvDsInferLayerInfo> const &layers, const char *name) {
  for (auto const &layer : layers)
    if (layer.layerName && std::strcmp(layer.layerName, name) == 0) return &layer;
  std::fprintf(stderr, "odtk parser: the model has no output %s: it is not one that odtk exported.\n", name);
  return nullptr;
}

long class_of(NvDsInferLayerInfo const &layer, unsigned row) {
  switch (layer.dataType) {
    case INT32: return static_cast<const int32_t *>(layer.buffer)[row];
    case FLOAT: return static_cast<long>(static_cast<const float *>(layer.buffer)[row]);
    default: return static_cast<long>(static_cast<const int64_t *>(layer.buffer)[row]);
  }
}

// DeepStream 9 added the angle to the struct; its display turns clockwise, odtk's angles counterclockwise.
template <class T>
auto set_angle(T &object, float angle, int) -> decltype(object.rotation_angle, bool()) {
  object.rotation_angle = -angle;
  return true;
}
template <class T>
bool set_angle(T &, float, long) {
  return false;
}

}  // namespace

extern "C" bool NvDsInferParseCustomOdtk(std::vector<NvDsInferLayerInfo> const &outputLayersInfo,
                                         NvDsInferNetworkInfo const &networkInfo,
                                         NvDsInferParseDetectionParams const &detectionParams,
                                         std::vector<NvDsInferObjectDetectionInfo> &objectList) {
  const auto *scores = find(outputLayersInfo, "scores");
  const auto *boxes = find(outputLayersInfo, "boxes");
  const auto *classes = find(outputLayersInfo, "classes");
  if (!scores || !boxes || !classes) return false;
  const unsigned rows = scores->inferDims.numElements;
  const unsigned values = rows ? boxes->inferDims.numElements / rows : 4;
  const bool known = classes->dataType == INT32 || classes->dataType == FLOAT || static_cast<int>(classes->dataType) == 4;
  if (scores->dataType != FLOAT || boxes->dataType != FLOAT || !known || (values != 4 && values != 6) ||
      classes->inferDims.numElements != rows || boxes->inferDims.numElements != rows * values) {
    std::fprintf(stderr, "odtk parser: scores, boxes and classes are not float [D], float [D, 4 or 6] and int [D].\n");
    return false;
  }
  const float width = static_cast<float>(networkInfo.width), height = static_cast<float>(networkInfo.height);
  for (unsigned row = 0; row < rows; ++row) {
    const float score = static_cast<const float *>(scores->buffer)[row];
    const long index = class_of(*classes, row);
    if (!(score > 0) || index < 0 || index >= static_cast<long>(detectionParams.numClassesConfigured)) continue;
    auto const &thresholds = detectionParams.perClassPreclusterThreshold;
    if (static_cast<size_t>(index) < thresholds.size() && score < thresholds[index]) continue;
    const float *box = static_cast<const float *>(boxes->buffer) + values * row;
    float left = box[0], top = box[1], right = box[2] + 1, bottom = box[3] + 1;  // corners are inclusive
    NvDsInferObjectDetectionInfo object{};
    if (values == 6) {
      if (!set_angle(object, std::atan2(box[4], box[5]), 0)) {
        std::fprintf(stderr, "odtk parser: rotated boxes need DeepStream 9, whose objects have a rotation_angle.\n");
        return false;
      }
    } else {  // nvinfer drops boxes that reach beyond the frame without a word
      left = std::max(left, 0.f), top = std::max(top, 0.f);
      right = std::min(right, width), bottom = std::min(bottom, height);
      if (right <= left || bottom <= top) continue;
    }
    object.classId = static_cast<unsigned>(index);
    object.left = left, object.top = top;
    object.width = right - left, object.height = bottom - top;
    object.detectionConfidence = score;
    objectList.push_back(object);
  }
  return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseCustomOdtk);
