// Kernel launches that report their own error and not that of an earlier call.
//
// For .cu files only. Includes no torch and no TensorRT.
#pragma once

#include <cuda_runtime.h>

#include <tuple>

#include "check.h"

#ifdef __CUDACC__  // without nvcc (tests/emulation) the emulated cuda_runtime.h brings its own
namespace odtk {

/// Enqueues kernel(arguments...) with static shared memory only; throws CudaError when the launch is refused.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
  std::tuple<Parameters...> values(arguments...);  // converted to exactly the kernel's types
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
        ODTK_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0, stream));
      },
      values);
}

}  // namespace odtk
#endif
