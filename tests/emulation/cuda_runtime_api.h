// The few names of CUDA's runtime API that csrc mentions; see cuda_runtime.h.
#pragma once

#include <cstddef>
#include <cstdint>

#define CUDART_VERSION 0

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;  // named by TensorRT's headers
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
