// Implements engine.h. Includes TensorRT's headers, csrc/plugins and csrc/cuda/check.h; may not include torch, pybind11
// or the kernels.
#include "engine.h"

#include <NvInfer.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>

#include "../cuda/check.h"
#include "../plugins/plugin.h"

// Installed packages have the parser's header. TensorRT's own repository does not (it is in onnx/onnx-tensorrt): then
// only build() is left out.
#if __has_include(<NvOnnxParser.h>)
#include <NvOnnxParser.h>
#define ODTK_ONNX_PARSER 1
#endif

namespace odtk {
namespace {

// ------------------------------------------------------------------------------------------------------------ logger

/// One per process and never destroyed, because TensorRT keeps the pointer in runtimes, engines and its global
/// registry.
class Logger final : public nvinfer1::ILogger {
 public:
  static Logger& get() {
    static auto* logger = new Logger;
    return *logger;
  }

  void log(Severity severity, const char* message) noexcept override {
    const LogLevel level = severity <= Severity::kERROR     ? LogLevel::kError
                           : severity == Severity::kWARNING ? LogLevel::kWarning
                           : severity == Severity::kINFO    ? LogLevel::kInfo
                                                            : LogLevel::kVerbose;
    try {
      LogCallback callback;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (level <= LogLevel::kWarning) {
          std::string& lines = level == LogLevel::kError ? errors_ : warnings_;
          lines.append(lines.empty() ? "" : "\n").append(message);
        }
        callback = callback_;
      }
      if (callback)
        callback(level, message);
      else if (level <= LogLevel::kWarning)
        std::fprintf(stderr, "TensorRT: %s\n", message);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "TensorRT: %s (the logger failed: %s)\n", message, error.what());
    }
  }

  void set_callback(LogCallback callback) {
    const std::lock_guard<std::mutex> lock(mutex_);
    callback_ = std::move(callback);
  }
  void forget_errors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    errors_.clear();
    warnings_.clear();
  }
  /// The errors since forget_errors(), or the warnings if there are none: TensorRT 8 gives some reasons as warnings.
  std::string errors() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return errors_.empty() ? warnings_ : errors_;
  }

 private:
  std::mutex mutex_;
  LogCallback callback_;
  std::string errors_, warnings_;
};

[[noreturn]] void fail(const std::string& task) {
  const std::string errors = Logger::get().errors();
  throw TensorRtError(task + (errors.empty() ? "" : ": " + errors));
}

template <typename T>
T* checked(T* made, const char* task) {
  if (!made) fail(std::string("TensorRT could not ") + task);
  return made;
}

// ----------------------------------------------------------------------------------------------------------- library

std::string& tensorrt_folder() {
  static std::string folder;
  return folder;
}

/// Opens a library of TensorRT with the major version of the headers.
void* open_library(const std::string& stem) {
  const std::string name = stem + ".so." + std::to_string(NV_TENSORRT_MAJOR);
  std::vector<std::string> paths;
  if (!tensorrt_folder().empty()) paths.push_back(tensorrt_folder() + "/" + name);
  if (const char* root = std::getenv("TENSORRT_ROOT")) {
    paths.push_back(std::string(root) + "/lib/" + name);
    paths.push_back(std::string(root) + "/" + name);
  }
  paths.push_back(name);
  std::string reason;
  for (const std::string& path : paths) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    reason = dlerror();
  }
  throw TensorRtError("TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + " was not found on this machine (" + reason +
                      "): install it, or set TENSORRT_ROOT or LD_LIBRARY_PATH to where " + name + " is");
}

template <typename Function>
Function* symbol(void* library, const char* name) {
  if (void* found = dlsym(library, name)) return reinterpret_cast<Function*>(found);
  throw TensorRtError(std::string("this TensorRT library has no function ") + name);
}

/// The C functions of libnvinfer. Everything else in TensorRT is reached through virtual methods.
struct Nvinfer {
  void* library = open_library("libnvinfer");
  void* (*create_builder)(void*, std::int32_t) = symbol<void*(void*, std::int32_t)>(library,
                                                                                    "createInferBuilder_INTERNAL");
  void* (*create_runtime)(void*, std::int32_t) = symbol<void*(void*, std::int32_t)>(library,
                                                                                    "createInferRuntime_INTERNAL");
  std::int32_t version = symbol<std::int32_t()>(library, "getInferLibVersion")();

  static const Nvinfer& get() {
    static const Nvinfer nvinfer;
    static const bool registered = [] {
      register_plugins(*symbol<nvinfer1::IPluginRegistry*()>(nvinfer.library, "getPluginRegistry")());
      return true;
    }();
    static_cast<void>(registered);
    return nvinfer;
  }
};

// -------------------------------------------------------------------------------------------------------------- build

#ifdef ODTK_ONNX_PARSER

#if NV_TENSORRT_MAJOR >= 10
/// Passes the steps of TensorRT's phases to BuildOptions::progress.
class Progress final : public nvinfer1::IProgressMonitor {
 public:
  explicit Progress(decltype(BuildOptions::progress) callback) : callback_(std::move(callback)) {}

  void phaseStart(const char* phase, const char*, std::int32_t steps) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    steps_[phase] = steps;
  }
  bool stepComplete(const char* phase, std::int32_t step) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      return callback_(phase, step + 1, steps_[phase]);
    } catch (...) {
      return false;
    }
  }
  void phaseFinish(const char* phase) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    steps_.erase(phase);
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::int32_t> steps_;
  decltype(BuildOptions::progress) callback_;
};
#endif

std::string parser_errors(const nvonnxparser::IParser& parser) {
  std::ostringstream text;
  for (int i = 0; i < parser.getNbErrors(); ++i) {
    const nvonnxparser::IParserError& error = *parser.getError(i);
    text << (i ? "; " : "") << "node " << error.node();
#if NV_TENSORRT_MAJOR >= 10
    text << " (" << error.nodeName() << ", " << error.nodeOperator() << ")";
#endif
    text << ": " << error.desc();
  }
  return text.str();
}

std::unique_ptr<nvonnxparser::IParser> parse(const void* onnx, std::size_t size,
                                             nvinfer1::INetworkDefinition& network) {
#if NV_TENSORRT_MAJOR < 10
  open_library("libnvinfer_plugin");  // the parser's library needs it and might not find it by itself
#endif
  const auto create = symbol<void*(void*, void*, int)>(open_library("libnvonnxparser"), "createNvOnnxParser_INTERNAL");
  std::unique_ptr<nvonnxparser::IParser> parser(static_cast<nvonnxparser::IParser*>(
      checked(create(&network, &Logger::get(), NV_ONNX_PARSER_VERSION), "create an ONNX parser")));
  if (!parser->parse(onnx, size))
    throw TensorRtError("TensorRT could not parse the ONNX graph: " + parser_errors(*parser));
  return parser;
}

#if NV_TENSORRT_MAJOR < 10
/// Keeps these layers in float32, in a network whose types TensorRT would choose.
void keep_in_float(nvinfer1::INetworkDefinition& network, const std::vector<std::string>& names) {
  for (int i = 0; i < network.getNbLayers(); ++i) {
    nvinfer1::ILayer& layer = *network.getLayer(i);
    if (std::find(names.begin(), names.end(), layer.getName()) == names.end()) continue;
    layer.setPrecision(nvinfer1::DataType::kFLOAT);
    for (int output = 0; output < layer.getNbOutputs(); ++output)
      layer.setOutputType(output, nvinfer1::DataType::kFLOAT);
  }
}
#endif

nvinfer1::IOptimizationProfile* profile(nvinfer1::IBuilder& builder, const nvinfer1::INetworkDefinition& network,
                                        const std::array<std::int32_t, 3>& batch) {
  if (!(1 <= batch[0] && batch[0] <= batch[1] && batch[1] <= batch[2]))
    throw std::invalid_argument("the batch sizes must be 1 <= MIN <= OPT <= MAX");
  using Select = nvinfer1::OptProfileSelector;
  nvinfer1::IOptimizationProfile* made = checked(builder.createOptimizationProfile(), "create a profile");
  for (int i = 0; i < network.getNbInputs(); ++i) {
    const nvinfer1::ITensor& input = *network.getInput(i);
    nvinfer1::Dims dims = input.getDimensions();
    const std::string name = input.getName();
    for (int axis = 1; axis < dims.nbDims; ++axis)
      if (dims.d[axis] < 0) throw std::invalid_argument("input " + name + ": only axis 0, the batch, may be dynamic");
    if (dims.nbDims < 1 || dims.d[0] >= 0) {
      if (dims.nbDims > 0 && (batch[0] != dims.d[0] || batch[2] != dims.d[0]))
        throw std::invalid_argument("input " + name + " has the fixed batch " + std::to_string(dims.d[0]));
      continue;
    }
    for (const auto& [select, size] :
         {std::pair(Select::kMIN, batch[0]), std::pair(Select::kOPT, batch[1]), std::pair(Select::kMAX, batch[2])}) {
      dims.d[0] = size;
      if (!made->setDimensions(name.c_str(), select, dims)) fail("TensorRT refused the batch sizes of input " + name);
    }
  }
  return made;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Writes beside `path` and renames, so that a reader never sees half a file.
void write_file(const std::string& path, const void* data, std::size_t size) {
  const std::string temporary = path + "." + std::to_string(getpid()) + ".tmp";
  std::ofstream file(temporary, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) throw TensorRtError("cannot write the file " + path);
}

#endif  // ODTK_ONNX_PARSER

// ----------------------------------------------------------------------------------------------------------- metadata

constexpr char kNamePrefix[] = "odtk:";
constexpr char kTrailer[] = "ODTKMETA";
constexpr std::size_t kTrailerSize = sizeof(kTrailer) - 1;
constexpr std::size_t kLongestName = 4095;

[[maybe_unused]] std::string network_name(const std::string& metadata) {
  const std::string name = kNamePrefix + metadata;
  return metadata.empty() || name.size() > kLongestName ? "" : name;
}

[[maybe_unused]] void append_trailer(std::vector<char>& file, const std::string& metadata) {
  file.insert(file.end(), metadata.begin(), metadata.end());
  for (int byte = 0; byte < 8; ++byte)
    file.push_back(static_cast<char>(static_cast<std::uint64_t>(metadata.size()) >> (8 * byte) & 0xFF));
  file.insert(file.end(), kTrailer, kTrailer + kTrailerSize);
}

// -------------------------------------------------------------------------------------------------------------- engine

std::string type_name(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return "float32";
    case nvinfer1::DataType::kHALF: return "float16";
    case nvinfer1::DataType::kINT8: return "int8";
    case nvinfer1::DataType::kINT32: return "int32";
    case nvinfer1::DataType::kBOOL: return "bool";
    case nvinfer1::DataType::kUINT8: return "uint8";
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kINT64: return "int64";
    case nvinfer1::DataType::kBF16: return "bfloat16";
#endif
    default: return "type " + std::to_string(static_cast<int>(type));
  }
}

std::vector<std::int64_t> shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

nvinfer1::Dims dims_of(const std::vector<std::int64_t>& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = static_cast<std::decay_t<decltype(dims.d[0])>>(shape[i]);
  return dims;
}

/// Makes a device current, and the previous one again when destroyed.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    ODTK_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device) ODTK_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

struct GraphDeleter {
  void operator()(CUgraphExec_st* graph) const { cudaGraphExecDestroy(graph); }
};
struct StreamDeleter {
  void operator()(CUstream_st* stream) const { cudaStreamDestroy(stream); }
};

/// A captured inference. It is valid for these addresses only.
struct Replay {
  std::vector<void*> addresses;
  std::unique_ptr<CUgraphExec_st, GraphDeleter> graph;
};

}  // namespace

void set_logger(LogCallback callback) { Logger::get().set_callback(std::move(callback)); }

void set_tensorrt_folder(const std::string& folder) { tensorrt_folder() = folder; }

std::string tensorrt_version() {
  const int version = Nvinfer::get().version;  // 8.6.1 is 8601, 10.16.0 is 101600
  const int unit = version >= 10000 ? 10000 : 1000;
  return std::to_string(version / unit) + "." + std::to_string(version % unit / 100) + "." +
         std::to_string(version % 100);
}

std::pair<std::size_t, std::string> split_plan(const void* file, std::size_t size) {
  const char* const begin = static_cast<const char*>(file);
  const char* const end = begin + size;
  if (size < kTrailerSize + 8 || std::memcmp(end - kTrailerSize, kTrailer, kTrailerSize) != 0) return {size, ""};
  std::uint64_t length = 0;
  for (int byte = 0; byte < 8; ++byte)
    length |= static_cast<std::uint64_t>(static_cast<unsigned char>(end[byte - 8 - std::ptrdiff_t{kTrailerSize}]))
              << (8 * byte);
  const std::size_t rest = size - kTrailerSize - 8;
  if (length > rest) throw TensorRtError("the plan file is damaged: its metadata is longer than the file");
  return {rest - length, std::string(begin + (rest - length), length)};
}

std::vector<char> build(const void* onnx, std::size_t size, const BuildOptions& options) {
#ifndef ODTK_ONNX_PARSER
  static_cast<void>(onnx), static_cast<void>(size), static_cast<void>(options);
  throw TensorRtError("odtk was built without NvOnnxParser.h: it can run engines, but not build them");
#else
  const Nvinfer& nvinfer = Nvinfer::get();
  Logger& logger = Logger::get();
  logger.forget_errors();
  const std::unique_ptr<nvinfer1::IBuilder> builder(static_cast<nvinfer1::IBuilder*>(
      checked(nvinfer.create_builder(&logger, NV_TENSORRT_VERSION), "create a builder (it needs a GPU)")));
#if NV_TENSORRT_MAJOR >= 11
  const std::uint32_t flags = 0;  // always strongly typed
#elif NV_TENSORRT_MAJOR == 10
  const std::uint32_t flags =
      1U << static_cast<std::uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  const std::uint32_t flags =
      1U << static_cast<std::uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#endif
  const std::unique_ptr<nvinfer1::INetworkDefinition> network(
      checked(builder->createNetworkV2(flags), "create a network"));
  const std::unique_ptr<nvonnxparser::IParser> parser = parse(onnx, size, *network);  // owns the weights
  if (const std::string name = network_name(options.metadata); !name.empty()) network->setName(name.c_str());

  const std::unique_ptr<nvinfer1::IBuilderConfig> config(
      checked(builder->createBuilderConfig(), "create a configuration"));
  config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, options.workspace);
  config->addOptimizationProfile(profile(*builder, *network, options.batch));
#if NV_TENSORRT_MAJOR >= 10
  std::unique_ptr<Progress> progress;
  if (options.progress) {
    progress = std::make_unique<Progress>(options.progress);
    config->setProgressMonitor(progress.get());
  }
#else
  if (options.fp16) config->setFlag(nvinfer1::BuilderFlag::kFP16);
  if (options.int8) config->setFlag(nvinfer1::BuilderFlag::kINT8);
  keep_in_float(*network, options.float_layers);
  if (!options.float_layers.empty()) config->setFlag(nvinfer1::BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
#endif
  std::unique_ptr<nvinfer1::ITimingCache> cache;
  if (!options.timing_cache.empty()) {
    const std::vector<char> bytes = read_file(options.timing_cache);
    cache.reset(checked(config->createTimingCache(bytes.data(), bytes.size()), "read the timing cache"));
    config->setTimingCache(*cache, false);
  }

  const std::unique_ptr<nvinfer1::IHostMemory> plan(
      checked(builder->buildSerializedNetwork(*network, *config), "build the engine"));
  if (cache) {
    const std::unique_ptr<nvinfer1::IHostMemory> bytes(checked(cache->serialize(), "save the timing cache"));
    write_file(options.timing_cache, bytes->data(), bytes->size());
  }
  const char* data = static_cast<const char*>(plan->data());
  std::vector<char> file(data, data + plan->size());
  if (!options.metadata.empty() && network_name(options.metadata).empty()) append_trailer(file, options.metadata);
  return file;
#endif
}

// Members are destroyed from last to first: graphs and context before the engine, the engine before its runtime.
struct Engine::State {
  int device = 0;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::unique_ptr<CUstream_st, StreamDeleter> capture;  // graphs are captured on it; nothing ever runs on it
  std::map<std::int64_t, Replay> replays;               // by batch size
  std::string metadata;
  std::vector<TensorInfo> tensors;
  std::pair<std::int64_t, std::int64_t> batch = {1, 1};
  std::mutex mutex;

  void describe() {
    using Select = nvinfer1::OptProfileSelector;
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
      const char* name = engine->getIOTensorName(i);
      TensorInfo info;
      info.name = name;
      info.input = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      info.type = type_name(engine->getTensorDataType(name));
      info.shape = shape_of(engine->getTensorShape(name));
      if (info.input && !info.shape.empty())
        batch = {engine->getProfileShape(name, 0, Select::kMIN).d[0],
                 engine->getProfileShape(name, 0, Select::kMAX).d[0]};
      tensors.push_back(std::move(info));
    }
  }

  /// The address of each tensor, in the order of `tensors`, and the batch size; refuses bindings that do not fit.
  std::pair<std::vector<void*>, std::int64_t> check(const std::map<std::string, Binding>& bindings) const {
    std::vector<void*> addresses;
    std::int64_t size = 0;
    for (const TensorInfo& tensor : tensors) {
      const auto found = bindings.find(tensor.name);
      if (found == bindings.end() || !found->second.data)
        throw std::invalid_argument("the engine's tensor '" + tensor.name + "' was not given");
      if (tensor.input) {
        check_shape(tensor, found->second.shape);
        size = found->second.shape.empty() ? size : found->second.shape[0];
      }
      addresses.push_back(found->second.data);
    }
    for (const auto& [name, binding] : bindings)
      if (std::none_of(tensors.begin(), tensors.end(), [&name = name](const TensorInfo& t) { return t.name == name; }))
        throw std::invalid_argument("the engine has no tensor '" + name + "'");
    return {std::move(addresses), size};
  }

  /// Passes shapes and addresses to the context.
  void bind(const std::map<std::string, Binding>& bindings) {
    for (const TensorInfo& tensor : tensors) {
      const Binding& binding = bindings.at(tensor.name);
      if (tensor.input && !context->setInputShape(tensor.name.c_str(), dims_of(binding.shape)))
        fail("TensorRT refused the shape of '" + tensor.name + "'");
      if (!context->setTensorAddress(tensor.name.c_str(), binding.data))
        fail("TensorRT refused the address of '" + tensor.name + "'");
    }
  }

  void check_shape(const TensorInfo& tensor, const std::vector<std::int64_t>& shape) const {
    bool fits = shape.size() == tensor.shape.size();
    for (std::size_t axis = 0; fits && axis < shape.size(); ++axis)
      fits = tensor.shape[axis] < 0 ? batch.first <= shape[axis] && shape[axis] <= batch.second
                                    : shape[axis] == tensor.shape[axis];
    if (fits) return;
    const auto text = [](const std::vector<std::int64_t>& sizes) {
      std::string line;
      for (const std::int64_t one : sizes) line += (line.empty() ? "" : ", ") + std::to_string(one);
      return "[" + line + "]";
    };
    throw std::invalid_argument("input '" + tensor.name + "' has the shape " + text(shape) + ", but the engine takes " +
                                text(tensor.shape) + " with a batch of " + std::to_string(batch.first) + " to " +
                                std::to_string(batch.second));
  }

  void enqueue(cudaStream_t stream) {
    if (!context->enqueueV3(stream)) fail("TensorRT could not run the engine");
  }

  /// Captures what enqueue() does with the shapes and addresses that are bound now.
  Replay capture_graph(std::vector<void*> addresses) {
    if (!capture) {
      cudaStream_t stream = nullptr;
      ODTK_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      capture.reset(stream);
    }
    cudaGraph_t graph = nullptr;
    ODTK_CHECK(cudaStreamBeginCapture(capture.get(), cudaStreamCaptureModeThreadLocal));
    const bool enqueued = context->enqueueV3(capture.get());
    const cudaError_t ended = cudaStreamEndCapture(capture.get(), &graph);
    if (!enqueued || ended != cudaSuccess) {
      cudaGetLastError();
      fail("this engine cannot be captured in a CUDA graph");
    }
    cudaGraphExec_t executable = nullptr;
    const cudaError_t instantiated = cudaGraphInstantiateWithFlags(&executable, graph, 0);
    cudaGraphDestroy(graph);
    ODTK_CHECK(instantiated);
    return {std::move(addresses), decltype(Replay::graph)(executable)};
  }
};

Engine::Engine(const void* file, std::size_t size) : state_(std::make_unique<State>()) {
  const Nvinfer& nvinfer = Nvinfer::get();
  Logger::get().forget_errors();
  if (const cudaError_t status = cudaGetDevice(&state_->device); status != cudaSuccess)
    throw TensorRtError(std::string("running a TensorRT engine needs a GPU: ") + cudaGetErrorString(status));
  const auto [plan_size, trailer] = split_plan(file, size);
  state_->runtime.reset(static_cast<nvinfer1::IRuntime*>(
      checked(nvinfer.create_runtime(&Logger::get(), NV_TENSORRT_VERSION), "create a runtime")));
  state_->engine.reset(checked(state_->runtime->deserializeCudaEngine(file, plan_size),
                               "load the plan (it runs only with the TensorRT version and GPU that it was built for)"));
  state_->context.reset(checked(state_->engine->createExecutionContext(), "create an execution context"));
  const std::string name = state_->engine->getName();
  const bool ours = name.rfind(kNamePrefix, 0) == 0;
  state_->metadata = !trailer.empty() ? trailer : ours ? name.substr(sizeof(kNamePrefix) - 1) : "";
  state_->describe();
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const std::string& Engine::metadata() const { return state_->metadata; }
const std::vector<TensorInfo>& Engine::tensors() const { return state_->tensors; }
std::pair<std::int64_t, std::int64_t> Engine::batch() const { return state_->batch; }

void Engine::infer(const std::map<std::string, Binding>& bindings, cudaStream_t stream, bool graph) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const DeviceGuard device(state.device);
  Logger::get().forget_errors();
  auto [addresses, batch] = state.check(bindings);
  const auto found = graph ? state.replays.find(batch) : state.replays.end();
  if (found != state.replays.end() && found->second.addresses == addresses) {
    ODTK_CHECK(cudaGraphLaunch(found->second.graph.get(), stream));
    return;
  }
  state.bind(bindings);
  state.enqueue(stream);  // before a capture too, because TensorRT prepares for a new shape in a plain run
  if (graph) state.replays[batch] = state.capture_graph(std::move(addresses));
}

}  // namespace odtk
