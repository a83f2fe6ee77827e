// Calls the parser as nvinfer does, from plain arrays, for ctypes.
#include <cmath>
#include <cstdint>

#include "nvdsinfer_custom_impl.h"

extern "C" bool NvDsInferParseCustomOdtk(std::vector<NvDsInferLayerInfo> const &, NvDsInferNetworkInfo const &,
                                         NvDsInferParseDetectionParams const &,
                                         std::vector<NvDsInferObjectDetectionInfo> &);

template <class T>
auto angle_of(T const &object, int) -> decltype(object.rotation_angle) {
  return object.rotation_angle;
}
template <class T>
float angle_of(T const &, long) {
  return NAN;
}

static NvDsInferLayerInfo layer(const char *name, NvDsInferDataType type, void *data, unsigned elements) {
  NvDsInferLayerInfo info{};
  info.dataType = type, info.layerName = name, info.buffer = data, info.inferDims.numElements = elements;
  return info;
}

// Objects found, written to out as rows of 7 (class, left, top, width, height, score, angle); -1 if the parser refuses.
extern "C" int probe(float *scores, float *boxes, void *classes, int class_type, unsigned rows, unsigned values,
                     unsigned width, unsigned height, unsigned num_classes, const float *thresholds, const char *first,
                     float *out) {
  std::vector<NvDsInferLayerInfo> layers{
      layer("classes", static_cast<NvDsInferDataType>(class_type), classes, rows),
      layer("boxes", FLOAT, boxes, rows * values),
      layer(first, FLOAT, scores, rows),
  };
  NvDsInferParseDetectionParams params{};
  params.numClassesConfigured = num_classes;
  params.perClassPreclusterThreshold.assign(thresholds, thresholds + num_classes);
  std::vector<NvDsInferObjectDetectionInfo> found;
  if (!NvDsInferParseCustomOdtk(layers, NvDsInferNetworkInfo{width, height, 3}, params, found)) return -1;
  for (auto const &o : found) {
    const float row[]{static_cast<float>(o.classId), o.left, o.top, o.width, o.height, o.detectionConfidence,
                      static_cast<float>(angle_of(o, 0))};
    for (float value : row) *out++ = value;
  }
  return static_cast<int>(found.size());
}
