// The check around every CUDA call: a call that fails becomes an exception with the call, the place and CUDA's reason.
//
// Includes CUDA's runtime API and the standard library only: no torch, no TensorRT, no kernel language.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace odtk {

/// A CUDA call failed. what() reads "cudaErrorX: text (call, file:line)".
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const char* call, const char* file, int line)
      : std::runtime_error(std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code) + " (" + call + ", " +
                           file + ":" + std::to_string(line) + ")"),
        code_(code) {}
  cudaError_t code() const noexcept { return code_; }

 private:
  cudaError_t code_;
};

}  // namespace odtk

/// Runs a CUDA runtime call; throws odtk::CudaError unless it returns cudaSuccess.
#define ODTK_CHECK(call)                                                         \
  do {                                                                           \
    const cudaError_t odtk_status = (call);                                      \
    if (odtk_status != cudaSuccess)                                              \
      throw ::odtk::CudaError(odtk_status, #call, __FILE__, __LINE__);           \
  } while (false)
