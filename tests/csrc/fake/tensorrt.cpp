// A TensorRT that computes nothing and prints what it is told, as libnvinfer, libnvonnxparser and libnvinfer_plugin, so
// that csrc/engine can be tested without a GPU: what it asks of TensorRT, in which order, and how long things live.
//
// defaults.h is written by tests/csrc/test_engine_calls.py from TensorRT's headers: for each abstract class X below a
// class DefaultX whose methods do nothing. The "ONNX" that it parses is text: numbers, which become the field metadata
// of an OdtkNms. Its plan is text too: name, profiles and what the plugin has serialized.
#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "defaults.h"

using namespace nvinfer1;

namespace {

constexpr bool kV3 = NV_TENSORRT_MAJOR >= 10;
using Sizes = std::array<long long, 3>;  // MIN, OPT, MAX

#if NV_TENSORRT_MAJOR >= 10
using DimsArgument = const Dims&;
#else
using DimsArgument = Dims;
#endif

bool cache_exists = false;

long number(const void* handle) { return static_cast<long>(reinterpret_cast<std::uintptr_t>(handle)); }

class Registry final : public DefaultIPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR >= 10
  using Creator = IPluginCreatorInterface;
  Creator* getCreator(const char* name, const char*, const char*) noexcept override { return find(name); }
  static const char* name_of(Creator* creator) { return static_cast<IPluginCreatorV3One*>(creator)->getPluginName(); }
#else
  using Creator = IPluginCreator;
  Creator* getPluginCreator(const char* name, const char*, const char*) noexcept override { return find(name); }
  static const char* name_of(Creator* creator) { return creator->getPluginName(); }
#endif
  bool registerCreator(Creator& creator, const char*) noexcept override {
    creators_.push_back(&creator);
    return true;
  }
  Creator* find(const char* name) const {
    for (Creator* creator : creators_)
      if (std::strcmp(name_of(creator), name) == 0) return creator;
    return nullptr;
  }

 private:
  std::vector<Creator*> creators_;
} registry;

/// What an OdtkNms with this metadata leaves in a plan.
std::string serialized_nms(const std::vector<std::int32_t>& metadata) {
  const std::int32_t values = 4, detections = 100;
  const float threshold = 0.5f;
  std::vector<PluginField> fields = {{"box_values", &values, PluginFieldType::kINT32, 1},
                                     {"threshold", &threshold, PluginFieldType::kFLOAT32, 1},
                                     {"detections", &detections, PluginFieldType::kINT32, 1}};
  if (!metadata.empty())
    fields.emplace_back("metadata", metadata.data(), PluginFieldType::kINT32,
                        static_cast<std::int32_t>(metadata.size()));
  const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  std::string bytes;
#if NV_TENSORRT_MAJOR >= 10
  auto& creator = *static_cast<IPluginCreatorV3One*>(registry.find("OdtkNms"));
  IPluginV3* plugin = creator.createPlugin("nms", &collection, TensorRTPhase::kBUILD);
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const PluginFieldCollection& kept = *runtime->getFieldsToSerialize();
  for (int i = 0; i < kept.nbFields; ++i) {
    const PluginField& field = kept.fields[i];
    const std::string data(static_cast<const char*>(field.data), 4 * static_cast<std::size_t>(field.length));
    bytes += std::string(field.name) + " " + std::to_string(static_cast<int>(field.type)) + " " +
             std::to_string(field.length) + " " + data;
  }
  delete plugin;
#else
  auto* plugin = registry.find("OdtkNms")->createPlugin("nms", &collection);
  bytes.resize(plugin->getSerializationSize());
  plugin->serialize(bytes.data());
  plugin->destroy();
#endif
  return bytes;
}

/// As a runtime does when it meets the plugin in a plan.
void deserialize_nms(const std::string& bytes) {
#if NV_TENSORRT_MAJOR >= 10
  std::istringstream text(bytes);
  std::vector<PluginField> fields;
  std::vector<std::string> names(8), data(8);
  for (std::size_t i = 0; text >> names[i]; ++i) {
    int type = 0, length = 0;
    text >> type >> length;
    text.get();
    data[i].resize(4 * static_cast<std::size_t>(length));
    text.read(data[i].data(), static_cast<std::streamsize>(data[i].size()));
    fields.emplace_back(names[i].c_str(), data[i].data(), static_cast<PluginFieldType>(type), length);
  }
  const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
  auto& creator = *static_cast<IPluginCreatorV3One*>(registry.find("OdtkNms"));
  delete creator.createPlugin("nms", &collection, TensorRTPhase::kRUNTIME);
#else
  registry.find("OdtkNms")->deserializePlugin("nms", bytes.data(), bytes.size())->destroy();
#endif
}

// ---- build ----

class Memory final : public IHostMemory, public DefaultVHostMemory {
 public:
  explicit Memory(std::string bytes) : bytes_(std::move(bytes)) { mImpl = this; }
  void* data() const noexcept override { return const_cast<char*>(bytes_.data()); }
  std::size_t size() const noexcept override { return bytes_.size(); }

 private:
  std::string bytes_;
};

class Cache final : public ITimingCache, public DefaultVTimingCache {
 public:
  Cache() { mImpl = this, cache_exists = true; }
  ~Cache() noexcept override { cache_exists = false; }
  IHostMemory* serialize() const noexcept override { return new Memory("a timing cache"); }
};

class Profile final : public IOptimizationProfile, public DefaultVOptimizationProfile {
 public:
  Profile() { mImpl = this; }
  bool setDimensions(const char*, OptProfileSelector select, DimsArgument dims) noexcept override {
    sizes[static_cast<std::size_t>(select)] = dims.d[0];
    return true;
  }
  Sizes sizes{};
};

class Input final : public ITensor, public DefaultVTensor {
 public:
  Input() { mImpl = this; }
  const char* getName() const noexcept override { return "images"; }
  Dims getDimensions() const noexcept override {
    Dims dims{};
    dims.nbDims = 2, dims.d[0] = -1, dims.d[1] = 3;
    return dims;
  }
};

class Network final : public INetworkDefinition, public DefaultVNetworkDefinition {
 public:
  Network() { mImpl = this; }
  std::int32_t getNbInputs() const noexcept override { return 1; }
  ITensor* getInput(std::int32_t) const noexcept override { return const_cast<Input*>(&input_); }
  void setName(const char* name) noexcept override { this->name = name; }
  std::string name;
  std::vector<std::int32_t> metadata;

 private:
  Input input_;
};

class Config final : public IBuilderConfig, public DefaultVBuilderConfig {
 public:
  Config() { mImpl = this; }
  void setFlag(BuilderFlag flag) noexcept override { std::printf("set flag %d\n", static_cast<int>(flag)); }
  void clearFlag(BuilderFlag flag) noexcept override { std::printf("clear flag %d\n", static_cast<int>(flag)); }
  void setHardwareCompatibilityLevel(HardwareCompatibilityLevel level) noexcept override {
    std::printf("hardware compatibility %d\n", static_cast<int>(level));
  }
  TacticSources getTacticSources() const noexcept override { return 31; }
  bool setTacticSources(TacticSources sources) noexcept override {
    std::printf("tactic sources %u\n", sources);
    return true;
  }
  void setPreviewFeature(PreviewFeature feature, bool enable) noexcept override {
    std::printf("preview feature %d %d\n", static_cast<int>(feature), enable);
  }
  std::int32_t addOptimizationProfile(const IOptimizationProfile* profile) noexcept override {
    profiles.push_back(static_cast<const Profile*>(profile)->sizes);
    return static_cast<std::int32_t>(profiles.size()) - 1;
  }
  ITimingCache* createTimingCache(const void* data, std::size_t size) const noexcept override {
    return size > 0 && std::memcmp(data, "damaged", 7) == 0 ? nullptr : new Cache;
  }
  bool setTimingCache(const ITimingCache& cache, bool) noexcept override { return &cache != nullptr; }
#if NV_TENSORRT_MAJOR >= 10
  void setProgressMonitor(IProgressMonitor* monitor) noexcept override { this->monitor = monitor; }
  IProgressMonitor* monitor = nullptr;
#endif
  std::vector<Sizes> profiles;
};

class Builder final : public IBuilder, public DefaultVBuilder {
 public:
  Builder() { mImpl = this; }
  ~Builder() noexcept override {
    if (had_cache_) std::printf("the builder ends, the timing cache %s\n", cache_exists ? "exists" : "is gone");
#if NV_TENSORRT_MAJOR >= 10
    if (monitor_) monitor_->phaseFinish("all");  // the address sanitizer tells if it is gone
#endif
  }
  IBuilderConfig* createBuilderConfig() noexcept override { return new Config; }
  INetworkDefinition* createNetworkV2(NetworkDefinitionCreationFlags) noexcept override { return new Network; }
  IOptimizationProfile* createOptimizationProfile() noexcept override { return new Profile; }
  IHostMemory* buildSerializedNetwork(INetworkDefinition& network, IBuilderConfig& config) noexcept override {
    had_cache_ = cache_exists;
    const auto& given = static_cast<const Network&>(network);
    const auto& told = static_cast<const Config&>(config);
#if NV_TENSORRT_MAJOR >= 10
    monitor_ = told.monitor;
    if (monitor_) {
      monitor_->phaseStart("all", nullptr, 1);
      monitor_->stepComplete("all", 0);
    }
#endif
    std::ostringstream plan;
    plan << told.profiles.size() << "\n";
    for (const Sizes& sizes : told.profiles) {
      std::printf("profile %lld %lld %lld\n", sizes[0], sizes[1], sizes[2]);
      plan << sizes[0] << " " << sizes[1] << " " << sizes[2] << "\n";
    }
    const std::string nms = serialized_nms(given.metadata);
    plan << given.name.size() << " " << nms.size() << "\n" << given.name << nms;
    return new Memory(plan.str());
  }

 private:
  bool had_cache_ = false;
#if NV_TENSORRT_MAJOR >= 10
  IProgressMonitor* monitor_ = nullptr;
#endif
};

class Parser final : public DefaultIParser {
 public:
  explicit Parser(INetworkDefinition& network) : network_(static_cast<Network&>(network)) {}
  bool parse(const void* onnx, std::size_t size, const char*) noexcept override {
    std::istringstream numbers(std::string(static_cast<const char*>(onnx), size));
    for (std::int32_t one; numbers >> one;) network_.metadata.push_back(one);
    return true;
  }

 private:
  Network& network_;
};

// ---- run ----

class Context final : public IExecutionContext, public DefaultVExecutionContext {
 public:
  explicit Context(std::size_t profiles) : profiles_(profiles) { mImpl = this, id_ = ++count; }
#if NV_TENSORRT_MAJOR >= 10
  void setDeviceMemoryV2(void* memory, std::int64_t) noexcept override { give(memory); }
#else
  void setDeviceMemory(void* memory) noexcept override { give(memory); }
#endif
  bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept override {
    std::printf("context %d profile %d stream %ld\n", id_, profile, number(stream));
    return static_cast<std::size_t>(profile) < profiles_;
  }
  bool setInputShape(const char*, const Dims& dims) noexcept override {
    std::printf("context %d batch %lld\n", id_, static_cast<long long>(dims.d[0]));
    return true;
  }
  bool setTensorAddress(const char*, void*) noexcept override { return true; }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    std::printf("context %d run stream %ld\n", id_, number(stream));
    return true;
  }

 private:
  void give(void* memory) { std::printf("context %d memory %ld\n", id_, number(memory)); }
  static inline int count = 0;
  std::size_t profiles_;
  int id_;
};

class Engine final : public ICudaEngine, public DefaultVCudaEngine {
 public:
  explicit Engine(const std::string& plan) {
    mImpl = this;
    std::istringstream text(plan);
    std::size_t count = 0, name = 0, nms = 0;
    text >> count;
    profiles_.resize(count);
    for (Sizes& sizes : profiles_) text >> sizes[0] >> sizes[1] >> sizes[2];
    text >> name >> nms;
    text.get();
    std::string bytes(nms, '\0');
    name_.resize(name);
    text.read(name_.data(), static_cast<std::streamsize>(name));
    text.read(bytes.data(), static_cast<std::streamsize>(nms));
    whole = text && text.peek() == std::istringstream::traits_type::eof();
    if (whole) deserialize_nms(bytes);
  }
  bool whole = false;  // nothing is missing, and nothing follows

#if NV_TENSORRT_MAJOR >= 10
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
    return strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED ? new Context(profiles_.size()) : nullptr;
  }
  std::int64_t getDeviceMemorySizeV2() const noexcept override { return 1000; }
#else
  IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept override {
    return new Context(profiles_.size());
  }
  std::size_t getDeviceMemorySize() const noexcept override { return 1000; }
#endif
  const char* getName() const noexcept override { return name_.c_str(); }
  std::int32_t getNbIOTensors() const noexcept override { return 2; }
  const char* getIOTensorName(std::int32_t index) const noexcept override { return index ? "scores" : "images"; }
  TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    return *name == 'i' ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(const char*) const noexcept override { return DataType::kFLOAT; }
  Dims getTensorShape(const char*) const noexcept override { return sized(-1); }
  std::int32_t getNbOptimizationProfiles() const noexcept override {
    return static_cast<std::int32_t>(profiles_.size());
  }
  Dims getProfileShape(const char*, std::int32_t profile, OptProfileSelector select) const noexcept override {
    return sized(profiles_[static_cast<std::size_t>(profile)][static_cast<std::size_t>(select)]);
  }

 private:
  static Dims sized(long long batch) {
    Dims dims{};
    dims.nbDims = 2, dims.d[1] = 3;
    dims.d[0] = static_cast<std::decay_t<decltype(dims.d[0])>>(batch);
    return dims;
  }
  std::vector<Sizes> profiles_;
  std::string name_;
};

class Runtime final : public IRuntime, public DefaultVRuntime {
 public:
  Runtime() { mImpl = this; }
#if NV_TENSORRT_MAJOR >= 10
  ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) noexcept override {
#else
  ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size, IPluginFactory*) noexcept override {
#endif
    auto* engine = new Engine({static_cast<const char*>(data), size});
    if (engine->whole) return engine;
    delete engine;
    return nullptr;
  }
  void setEngineHostCodeAllowed(bool allowed) noexcept override { std::printf("host code allowed %d\n", allowed); }
};

}  // namespace

// As in TensorRT's own libraries. Their headers have some of these names already, with attributes of their own.
extern "C" {
__attribute__((visibility("default"))) void* createInferBuilder_INTERNAL(void*, std::int32_t) noexcept {
  return static_cast<IBuilder*>(new Builder);
}
__attribute__((visibility("default"))) void* createInferRuntime_INTERNAL(void*, std::int32_t) noexcept {
  return static_cast<IRuntime*>(new Runtime);
}
__attribute__((visibility("default"))) std::int32_t getInferLibVersion() noexcept { return NV_TENSORRT_VERSION; }
__attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
__attribute__((visibility("default"))) void* createNvOnnxParser_INTERNAL(void* network, void*, int) noexcept {
  return static_cast<nvonnxparser::IParser*>(new Parser(*static_cast<INetworkDefinition*>(network)));
}
}
