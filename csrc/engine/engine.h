// Builds a TensorRT plan from ONNX; loads a plan and runs it by tensor name on the caller's stream. It knows nothing
// about detection. May not include torch, pybind11, or TensorRT's headers (engine.cpp includes those).
//
// libnvinfer and libnvonnxparser are opened at the first use and not linked, so the module can be imported on a machine
// without them, where it throws only when they are needed. They are looked for in the folder given to
// set_tensorrt_folder(), $TENSORRT_ROOT/lib, $TENSORRT_ROOT, and then where the loader looks. Their major version must
// be that of the headers.
//
// Plan files are plain TensorRT plans, so that trtexec, Triton and DeepStream load them: TensorRT refuses a file with
// bytes after the plan ("Size specified in header does not match archive size"). The metadata is the engine's name, or,
// where it is longer than the 4095 bytes of a name, in the plan's OdtkNms plugin (its field "metadata").
// Files of odtk 0.3 have such metadata behind the plan, and are still read:
//   plan | metadata | its length, 8 bytes little-endian | "ODTKMETA"
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace odtk {

/// TensorRT is missing or failed. what() says what was tried, then gives TensorRT's own messages.
class TensorRtError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class LogLevel { kError, kWarning, kInfo, kVerbose };
using LogCallback = std::function<void(LogLevel, const std::string&)>;

/// Sets where TensorRT's messages go, for the whole process; it is called from any thread. Empty: errors and warnings
/// go to stderr.
void set_logger(LogCallback callback);

/// Sets where TensorRT's libraries are looked for first. Has no effect once they are open.
void set_tensorrt_folder(const std::string& folder);

/// The version of the library, not of the headers, such as "10.16.0". Throws TensorRtError if there is no library.
std::string tensorrt_version();

/// The most bytes of metadata that fit into an engine's name.
constexpr std::size_t kLongestMetadata = 4095 - 5;

/// Whether build() can work: odtk was compiled with the header of TensorRT's ONNX parser.
bool can_build();

struct BuildOptions {
  /// MIN, OPT, MAX of each input's dynamic axis 0. They are optimization profile 0, which hosts take that do not choose;
  /// where batch 1 is allowed and OPT is another, profile 1 is for batch 1 alone, with tactics of its own.
  std::array<std::int32_t, 3> batch = {1, 8, 16};
  std::size_t workspace = std::size_t{4} << 30;    ///< bytes that tactics may use
  bool fp16 = false;                               ///< TensorRT 8 only: 10 and 11 take the types from the graph
  bool int8 = false;                               ///< TensorRT 8 only, for a graph with Q/DQ
  bool tf32 = true;                                ///< float32 products may round their factors to 10 bits
  bool hardware_compatible = false;                ///< for every GPU from Ampere on; TensorRT 8.6 and newer
  bool version_compatible = false;                 ///< for newer TensorRT too; TensorRT 8.6 and newer
  std::vector<std::string> float_layers;           ///< TensorRT 8 only: nodes that stay in float32
  std::string timing_cache;                        ///< a file, read if it exists, written after the build; empty: none
  std::string metadata;                            ///< becomes the engine's name, so at most kLongestMetadata bytes
  /// TensorRT 10 and newer: called from any thread when a step is complete; the build stops if it returns false.
  std::function<bool(const std::string& phase, int step, int steps)> progress;
};

/// Builds the plan for this GPU. Throws TensorRtError, and std::invalid_argument for options that contradict the
/// network.
std::vector<char> build(const void* onnx, std::size_t size, const BuildOptions& options);

/// The size of the plain TensorRT plan in a plan file, and the metadata of the trailer (empty if there is none).
std::pair<std::size_t, std::string> split_plan(const void* file, std::size_t size);

struct TensorInfo {
  std::string name;
  bool input = false;
  std::string type;                 ///< float32, float16, int32, int64, int8, uint8, bool, bfloat16
  std::vector<std::int64_t> shape;  ///< -1 for the dynamic batch
};

/// A tensor of one call: device memory, aligned to kAlignment bytes, and its shape. The shape of an output is not read.
constexpr std::size_t kAlignment = 256;

struct Binding {
  void* data = nullptr;
  std::vector<std::int64_t> shape;
};

/// A loaded plan, on the device that was current when it was constructed. Its execution contexts, one for each
/// optimization profile and each captured batch size, share one block of device memory.
class Engine {
 public:
  /// A plan of a version-compatible build contains code for the CPU; it is refused unless the environment has
  /// ODTK_ALLOW_HOST_CODE=1.
  Engine(const void* file, std::size_t size);
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  /// What BuildOptions::metadata was, or the bytes that the plan's OdtkNms carries, or those of a trailer.
  const std::string& metadata() const;
  const std::vector<TensorInfo>& tensors() const;
  /// The smallest and the largest batch of optimization profile 0, which holds those of the others.
  std::pair<std::int64_t, std::int64_t> batch() const;

  /// Enqueues one inference on `stream`. Every tensor of tensors() must be bound; the outputs are written to theirs.
  ///
  /// With `graph`, the first call for a batch size runs a plain inference and then captures a CUDA graph; later calls
  /// replay it. It is captured again if a pointer has changed, so keep the buffers.
  /// Calls from several threads wait for each other, and on the GPU a run waits for the end of the one before it, on
  /// whatever stream that was: they share memory. So `stream` may not be capturing.
  /// Throws TensorRtError, CudaError, and std::invalid_argument for a tensor that is missing, unknown, of the wrong
  /// shape or not aligned, and for a stream that is capturing.
  void infer(const std::map<std::string, Binding>& bindings, cudaStream_t stream, bool graph = false);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace odtk
