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

/// Whether some input's batch is dynamic.
bool dynamic(const nvinfer1::INetworkDefinition& network) {
  for (int i = 0; i < network.getNbInputs(); ++i) {
    const nvinfer1::Dims dims = network.getInput(i)->getDimensions();
    if (dims.nbDims > 0 && dims.d[0] < 0) return true;
  }
  return false;
}

void add_profiles(nvinfer1::IBuilder& builder, const nvinfer1::INetworkDefinition& network,
                  nvinfer1::IBuilderConfig& config, const std::array<std::int32_t, 3>& batch) {
  std::vector<std::array<std::int32_t, 3>> profiles = {batch};
  if (dynamic(network) && batch[0] == 1 && batch[1] > 1) profiles.push_back({1, 1, 1});
  for (const auto& sizes : profiles)
    if (config.addOptimizationProfile(profile(builder, network, sizes)) < 0)
      fail("TensorRT refused the optimization profile of batch " + std::to_string(sizes[1]));
}

/// The plan's compatibility with other GPUs and other versions of TensorRT.
void set_compatibility(nvinfer1::IBuilderConfig& config, const BuildOptions& options) {
#if NV_TENSORRT_MAJOR >= 10 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 6)
  if (options.hardware_compatible)
    config.setHardwareCompatibilityLevel(nvinfer1::HardwareCompatibilityLevel::kAMPERE_PLUS);
  if (options.version_compatible) config.setFlag(nvinfer1::BuilderFlag::kVERSION_COMPATIBLE);
#else
  static_cast<void>(config);
  if (options.hardware_compatible) throw std::invalid_argument("--hardware-compatible needs TensorRT 8.6 or newer");
  if (options.version_compatible) throw std::invalid_argument("--version-compatible needs TensorRT 8.6 or newer");
#endif
}

#if NV_TENSORRT_MAJOR < 10
/// What TensorRT 8 must be told and newer versions do by themselves.
void configure_tensorrt8(nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config,
                         const BuildOptions& options) {
  if (options.fp16) config.setFlag(nvinfer1::BuilderFlag::kFP16);
  if (options.int8) config.setFlag(nvinfer1::BuilderFlag::kINT8);
  keep_in_float(network, options.float_layers);
  if (!options.float_layers.empty()) config.setFlag(nvinfer1::BuilderFlag::kPREFER_PRECISION_CONSTRAINTS);
  // On by default, they make an engine load cuBLAS and cuDNN and hand them to its plugins; nothing of ours uses them.
  nvinfer1::TacticSources sources = config.getTacticSources();
  for (const auto source :
       {nvinfer1::TacticSource::kCUBLAS, nvinfer1::TacticSource::kCUBLAS_LT, nvinfer1::TacticSource::kCUDNN})
    sources &= ~(1U << static_cast<std::uint32_t>(source));
  if (!config.setTacticSources(sources)) fail("TensorRT could not be told to do without cuBLAS and cuDNN");
#if NV_TENSORRT_MINOR >= 6
  config.setPreviewFeature(nvinfer1::PreviewFeature::kPROFILE_SHARING_0806, true);  // for Engine's contexts
#endif
}
#endif

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

struct EventDeleter {
  void operator()(CUevent_st* event) const { cudaEventDestroy(event); }
};
struct MemoryDeleter {
  void operator()(void* memory) const { cudaFree(memory); }
};

/// An execution context, and the inference that was captured from it: for this batch size and these addresses. It is
/// dropped when the context runs anything else, because a new shape changes what the graph reads.
struct Run {
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::int64_t batch = 0;
  std::vector<void*> addresses;
  std::unique_ptr<CUgraphExec_st, GraphDeleter> graph;
};

#if NV_TENSORRT_MAJOR >= 10 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 6)
constexpr bool kSharedProfiles = true;
#else
constexpr bool kSharedProfiles = false;  // TensorRT 8.5: an optimization profile is for one context
#endif

/// A context whose device memory is provided by give_memory().
nvinfer1::IExecutionContext* create_context(nvinfer1::ICudaEngine& engine) {
#if NV_TENSORRT_MAJOR >= 10
  return engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
#else
  return engine.createExecutionContextWithoutDeviceMemory();
#endif
}

// TensorRT 10.1 replaced these two.
#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1001
std::size_t memory_size(const nvinfer1::ICudaEngine& engine) {
  return static_cast<std::size_t>(engine.getDeviceMemorySizeV2());
}
void give_memory(nvinfer1::IExecutionContext& context, void* memory, std::size_t size) {
  context.setDeviceMemoryV2(memory, static_cast<std::int64_t>(size));
}
#else
std::size_t memory_size(const nvinfer1::ICudaEngine& engine) { return engine.getDeviceMemorySize(); }
void give_memory(nvinfer1::IExecutionContext& context, void* memory, std::size_t) { context.setDeviceMemory(memory); }
#endif

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

bool can_build() {
#ifdef ODTK_ONNX_PARSER
  return true;
#else
  return false;
#endif
}

std::vector<char> build(const void* onnx, std::size_t size, const BuildOptions& options) {
#ifndef ODTK_ONNX_PARSER
  static_cast<void>(onnx), static_cast<void>(size), static_cast<void>(options);
  throw TensorRtError("odtk was built without NvOnnxParser.h: it can run engines, but not build them");
#else
  const Nvinfer& nvinfer = Nvinfer::get();
  Logger& logger = Logger::get();
  logger.forget_errors();
  if (options.metadata.size() > kLongestMetadata)
    throw std::invalid_argument("metadata of " + std::to_string(options.metadata.size()) +
                                " bytes does not fit into an engine's name: put it into the field metadata of OdtkNms");
  // Both must outlive the builder.
  std::unique_ptr<nvinfer1::ITimingCache> cache;
#if NV_TENSORRT_MAJOR >= 10
  std::unique_ptr<Progress> progress;
#endif
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
  if (!options.metadata.empty()) network->setName((kNamePrefix + options.metadata).c_str());

  const std::unique_ptr<nvinfer1::IBuilderConfig> config(
      checked(builder->createBuilderConfig(), "create a configuration"));
  config->setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, options.workspace);
  if (!options.tf32) config->clearFlag(nvinfer1::BuilderFlag::kTF32);
  set_compatibility(*config, options);
  add_profiles(*builder, *network, *config, options.batch);
#if NV_TENSORRT_MAJOR >= 10
  if (options.progress) {
    progress = std::make_unique<Progress>(options.progress);
    config->setProgressMonitor(progress.get());
  }
#else
  configure_tensorrt8(*network, *config, options);
#endif
  if (!options.timing_cache.empty()) {
    const std::vector<char> bytes = read_file(options.timing_cache);
    cache.reset(config->createTimingCache(bytes.data(), bytes.size()));
    if (!cache || !config->setTimingCache(*cache, false))
      fail("the timing cache " + options.timing_cache +
           " is not one of this TensorRT and GPU: delete it, or name another file");
  }

  const std::unique_ptr<nvinfer1::IHostMemory> plan(
      checked(builder->buildSerializedNetwork(*network, *config), "build the engine"));
  if (cache) {
    const std::unique_ptr<nvinfer1::IHostMemory> bytes(checked(cache->serialize(), "save the timing cache"));
    write_file(options.timing_cache, bytes->data(), bytes->size());
  }
  const char* data = static_cast<const char*>(plan->data());
  return {data, data + plan->size()};
#endif
}

// Members are destroyed from last to first: graphs and contexts before their memory, then the engine and its runtime.
struct Engine::State {
  int device = 0;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::unique_ptr<void, MemoryDeleter> memory;          // of all contexts: their runs never overlap
  std::unique_ptr<CUevent_st, EventDeleter> done;       // the end of the latest run
  std::unique_ptr<CUstream_st, StreamDeleter> capture;  // graphs are captured on it; nothing ever runs on it
  std::map<std::pair<int, std::int64_t>, Run> runs;     // by profile and batch size, 0 for those without a graph
  std::string metadata;
  std::vector<TensorInfo> tensors;
  std::vector<std::pair<std::int64_t, std::int64_t>> batches = {{1, 1}};  // the least and the largest of each profile
  std::mutex mutex;

  ~State() {
    if (done) cudaEventSynchronize(done.get());
  }

  void describe() {
    using Select = nvinfer1::OptProfileSelector;
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
      const char* name = engine->getIOTensorName(i);
      TensorInfo info;
      info.name = name;
      info.input = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      info.type = type_name(engine->getTensorDataType(name));
      info.shape = shape_of(engine->getTensorShape(name));
      if (info.input && !info.shape.empty()) {
        batches.clear();
        for (int profile = 0; profile < std::max(engine->getNbOptimizationProfiles(), 1); ++profile)
          batches.emplace_back(engine->getProfileShape(name, profile, Select::kMIN).d[0],
                               engine->getProfileShape(name, profile, Select::kMAX).d[0]);
      }
      tensors.push_back(std::move(info));
    }
  }

  /// The narrowest profile that holds a batch size.
  int profile_of(std::int64_t batch) const {
    std::size_t best = 0;
    for (std::size_t i = 1; i < batches.size(); ++i)
      if (batches[i].first <= batch && batch <= batches[i].second && batches[i].second < batches[best].second) best = i;
    return static_cast<int>(best);
  }

  /// The context for a profile and, if it is to be captured, a batch size; made at the first call.
  Run& run_of(int profile, std::int64_t batch, cudaStream_t stream) {
    Run& run = runs[{profile, batch}];
    if (run.context) return run;
    std::unique_ptr<nvinfer1::IExecutionContext> made(checked(create_context(*engine), "create an execution context"));
    const std::size_t size = memory_size(*engine);
    if (!memory && size > 0) {
      void* block = nullptr;
      ODTK_CHECK(cudaMalloc(&block, size));
      memory.reset(block);
    }
    give_memory(*made, memory.get(), size);
    if (!made->setOptimizationProfileAsync(profile, stream))
      fail("TensorRT refused optimization profile " + std::to_string(profile));
    run.context = std::move(made);
    return run;
  }

  /// The address of each tensor, in the order of `tensors`, and the batch size; refuses bindings that do not fit.
  std::pair<std::vector<void*>, std::int64_t> check(const std::map<std::string, Binding>& bindings) const {
    std::vector<void*> addresses;
    std::int64_t size = 0;
    for (const TensorInfo& tensor : tensors) {
      const auto found = bindings.find(tensor.name);
      if (found == bindings.end() || !found->second.data)
        throw std::invalid_argument("the engine's tensor '" + tensor.name + "' was not given");
      if (reinterpret_cast<std::uintptr_t>(found->second.data) % kAlignment != 0)
        throw std::invalid_argument("the address of '" + tensor.name + "' must be aligned to " +
                                    std::to_string(kAlignment) + " bytes, as TensorRT requires: copy the tensor");
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
  void bind(nvinfer1::IExecutionContext& context, const std::map<std::string, Binding>& bindings) {
    for (const TensorInfo& tensor : tensors) {
      const Binding& binding = bindings.at(tensor.name);
      if (tensor.input && !context.setInputShape(tensor.name.c_str(), dims_of(binding.shape)))
        fail("TensorRT refused the shape of '" + tensor.name + "'");
      if (!context.setTensorAddress(tensor.name.c_str(), binding.data))
        fail("TensorRT refused the address of '" + tensor.name + "'");
    }
  }

  void check_shape(const TensorInfo& tensor, const std::vector<std::int64_t>& shape) const {
    bool fits = shape.size() == tensor.shape.size();
    for (std::size_t axis = 0; fits && axis < shape.size(); ++axis)
      fits = tensor.shape[axis] < 0 ? batches[0].first <= shape[axis] && shape[axis] <= batches[0].second
                                    : shape[axis] == tensor.shape[axis];
    if (fits) return;
    const auto text = [](const std::vector<std::int64_t>& sizes) {
      std::string line;
      for (const std::int64_t one : sizes) line += (line.empty() ? "" : ", ") + std::to_string(one);
      return "[" + line + "]";
    };
    throw std::invalid_argument("input '" + tensor.name + "' has the shape " + text(shape) + ", but the engine takes " +
                                text(tensor.shape) + " with a batch of " + std::to_string(batches[0].first) +
                                " to " + std::to_string(batches[0].second));
  }

  /// Records the end of what was enqueued, for the next run to wait for.
  void finish(cudaStream_t stream) { ODTK_CHECK(cudaEventRecord(done.get(), stream)); }

  /// Captures what the context does with the shapes and addresses that are bound now.
  decltype(Run::graph) capture_graph(nvinfer1::IExecutionContext& context) {
    if (!capture) {
      cudaStream_t stream = nullptr;
      ODTK_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      capture.reset(stream);
    }
    cudaGraph_t graph = nullptr;
    ODTK_CHECK(cudaStreamBeginCapture(capture.get(), cudaStreamCaptureModeThreadLocal));
    const bool enqueued = context.enqueueV3(capture.get());
    const cudaError_t ended = cudaStreamEndCapture(capture.get(), &graph);
    if (!enqueued || ended != cudaSuccess) {
      cudaGetLastError();
      fail("this engine cannot be captured in a CUDA graph");
    }
    cudaGraphExec_t executable = nullptr;
    const cudaError_t instantiated = cudaGraphInstantiateWithFlags(&executable, graph, 0);
    cudaGraphDestroy(graph);
    ODTK_CHECK(instantiated);
    return decltype(Run::graph)(executable);
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
#if NV_TENSORRT_MAJOR >= 10 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 6)
  if (const char* allowed = std::getenv("ODTK_ALLOW_HOST_CODE"); allowed && std::strcmp(allowed, "1") == 0)
    state_->runtime->setEngineHostCodeAllowed(true);
#endif
  std::string carried;
  {
    static std::mutex loading;  // one plan at a time, so that the metadata that its plugin hands over is its own
    const std::lock_guard<std::mutex> lock(loading);
    take_metadata();
    state_->engine.reset(checked(state_->runtime->deserializeCudaEngine(file, plan_size),
                                 "load the plan (it runs only with the TensorRT version and GPU that it was built for; "
                                 "one of a version-compatible build needs ODTK_ALLOW_HOST_CODE=1)"));
    carried = take_metadata();
  }
  const std::string name = state_->engine->getName();
  const bool named = name.rfind(kNamePrefix, 0) == 0;
  state_->metadata = !trailer.empty() ? trailer : named ? name.substr(sizeof(kNamePrefix) - 1) : carried;
  cudaEvent_t event = nullptr;
  ODTK_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  state_->done.reset(event);
  state_->describe();
  state_->run_of(0, 0, nullptr);  // a GPU without the memory for it is refused here
  state_->finish(nullptr);        // TensorRT may have enqueued copies for the profile
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

const std::string& Engine::metadata() const { return state_->metadata; }
const std::vector<TensorInfo>& Engine::tensors() const { return state_->tensors; }
std::pair<std::int64_t, std::int64_t> Engine::batch() const { return state_->batches[0]; }

void Engine::infer(const std::map<std::string, Binding>& bindings, cudaStream_t stream, bool graph) {
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const DeviceGuard device(state.device);
  Logger::get().forget_errors();
  auto [addresses, batch] = state.check(bindings);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  ODTK_CHECK(cudaStreamIsCapturing(stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone)
    throw std::invalid_argument("an engine cannot run on a stream that is being captured: let it capture by itself");

  ODTK_CHECK(cudaStreamWaitEvent(stream, state.done.get(), 0));
  Run& run = state.run_of(state.profile_of(batch), graph && kSharedProfiles ? batch : 0, stream);
  if (graph && run.graph && run.batch == batch && run.addresses == addresses) {
    ODTK_CHECK(cudaGraphLaunch(run.graph.get(), stream));
    return state.finish(stream);
  }
  run.graph.reset();
  state.bind(*run.context, bindings);
  // Before a capture too, because TensorRT prepares for a new shape in a plain run.
  if (!run.context->enqueueV3(stream)) fail("TensorRT could not run the engine");
  state.finish(stream);
  if (!graph) return;
  run.graph = state.capture_graph(*run.context);
  run.batch = batch;
  run.addresses = std::move(addresses);
}

}  // namespace odtk
