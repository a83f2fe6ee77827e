// Engine: builds a TensorRT plan from ONNX, loads one, runs it by tensor name on the caller's stream. It knows nothing
// of detection. Neither torch nor TensorRT's headers are needed to use it.
//
// libnvinfer and libnvonnxparser are opened at the first use, not linked: what is built here runs, and imports, on a
// machine without them, and says so when they are needed. Searched: the folder given to set_tensorrt_folder(),
// $TENSORRT_ROOT/lib, $TENSORRT_ROOT, then the loader's own path. Only the major version must be that of the headers.
//
// Plan files. The metadata (a JSON string) travels as the engine's name inside the plan, so that the file is a plain
// TensorRT plan for trtexec, Triton and DeepStream. TensorRT stores 4095 bytes of a name: longer metadata (of a few
// hundred classes) follows the plan as a trailer,
//   plan | metadata | its length, 8 bytes little-endian | "ODTKMETA"
// which Engine removes; TensorRT itself refuses such a file ("Size specified in header does not match archive size"),
// and split_plan() gives the plain plan back.
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

/// TensorRT is missing or refused. what(): what was tried, then TensorRT's own messages.
class TensorRtError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class LogLevel { kError, kWarning, kInfo, kVerbose };
using LogCallback = std::function<void(LogLevel, const std::string&)>;

/// Where TensorRT's lines go, for the whole process and from any thread. Empty: errors and warnings to stderr.
void set_logger(LogCallback callback);

/// Where TensorRT's libraries are looked for first. Without effect once they are open.
void set_tensorrt_folder(const std::string& folder);

/// "10.16.0" of the library, not of the headers. Throws TensorRtError where there is none.
std::string tensorrt_version();

struct BuildOptions {
  std::array<std::int32_t, 3> batch = {1, 8, 16};  ///< optimization profile: MIN OPT MAX of each input's dynamic axis 0
  std::size_t workspace = std::size_t{4} << 30;    ///< bytes that tactics may use
  bool fp16 = false;                               ///< TensorRT 8 only: 10 and 11 take the types from the graph
  bool int8 = false;                               ///< TensorRT 8 only, for a graph with Q/DQ
  std::vector<std::string> float_layers;           ///< TensorRT 8 only: nodes that are to stay in float32
  std::string timing_cache;                        ///< file, read when there, written after the build; empty: none
  std::string metadata;                            ///< stored with the plan, see above
  /// Called as steps complete, from any thread, TensorRT 10 and newer; false stops the build.
  std::function<bool(const std::string& phase, int step, int steps)> progress;
};

/// The plan for this GPU. Throws TensorRtError; std::invalid_argument for options that contradict the network.
std::vector<char> build(const void* onnx, std::size_t size, const BuildOptions& options);

/// The plain TensorRT plan's size in a plan file, and the trailer's metadata (empty without a trailer).
std::pair<std::size_t, std::string> split_plan(const void* file, std::size_t size);

struct TensorInfo {
  std::string name;
  bool input = false;
  std::string type;                 ///< float32, float16, int32, int64, int8, uint8, bool, bfloat16
  std::vector<std::int64_t> shape;  ///< -1 for the dynamic batch
};

/// A tensor of one call: device memory and its shape (of an output: for the caller's own use only).
struct Binding {
  void* data = nullptr;
  std::vector<std::int64_t> shape;
};

/// A loaded plan with one execution context, on the device that was current at construction.
class Engine {
 public:
  Engine(const void* file, std::size_t size);
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  const std::string& metadata() const;
  const std::vector<TensorInfo>& tensors() const;
  /// Smallest and largest batch of the optimization profile.
  std::pair<std::int64_t, std::int64_t> batch() const;

  /// Enqueues one inference on `stream`. Every tensor of tensors() must be bound; outputs are written there.
  ///
  /// With `graph` a CUDA graph is captured at the first call of a batch size (after a plain inference) and replayed
  /// from then on; it is captured again when a pointer has changed, so keep the buffers.
  /// One call at a time; calls from several threads wait for each other. Throws TensorRtError, CudaError, and
  /// std::invalid_argument for a missing, unknown or misshapen tensor.
  void infer(const std::map<std::string, Binding>& bindings, cudaStream_t stream, bool graph = false);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace odtk
