// The part of DeepStream's interface of parsers that ours uses, for compiling it without DeepStream: the same names,
// types and order of fields. -DDEEPSTREAM_8 leaves out what DeepStream 9 added.
#pragma once
#include <vector>

typedef enum { FLOAT, HALF, INT8, INT32, INT64, UINT8 } NvDsInferDataType;

typedef struct {
  unsigned int numDims;
  unsigned int d[8];
  unsigned int numElements;
} NvDsInferDims;

typedef struct {
  NvDsInferDataType dataType;
  NvDsInferDims inferDims;
  int bindingIndex;
  const char *layerName;
  void *buffer;
  int isInput;
} NvDsInferLayerInfo;

typedef struct {
  unsigned int width, height, channels;
} NvDsInferNetworkInfo;

typedef struct {
  unsigned int classId;
  float left, top, width, height, detectionConfidence;
#ifndef DEEPSTREAM_8
  float rotation_angle;
#endif
} NvDsInferObjectDetectionInfo;

typedef struct {
  unsigned int numClassesConfigured;
  std::vector<float> perClassPreclusterThreshold, perClassPostclusterThreshold;
} NvDsInferParseDetectionParams;

#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(name) static_assert(true, "")
