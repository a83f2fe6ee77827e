// TensorRT 8's own ONNX parser on a network that only prints which plugins and casts it is given. Needs no GPU, as the
// builder, which would, is not there.
//   parser_probe NVINFER PLUGINS PARSER MODEL.onnx LIBRARY…     the last ones are loaded first
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "defaults.h"

using namespace nvinfer1;

namespace {

class Messages final : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

class Tensor final : public ITensor, public DefaultVTensor {
 public:
  Tensor(DataType type, Dims dims) : type_(type), dims_(dims) { mImpl = this; }
  void setName(const char* name) noexcept override { name_ = name; }
  const char* getName() const noexcept override { return name_.c_str(); }
  Dims getDimensions() const noexcept override { return dims_; }
  DataType getType() const noexcept override { return type_; }

 private:
  DataType type_;
  Dims dims_;
  std::string name_;
};

/// A layer of a plugin; its outputs have no dimensions.
class PluginLayer final : public IPluginV2Layer, public DefaultVLayer, public DefaultVPluginV2Layer {
 public:
  explicit PluginLayer(IPluginV2& plugin) : plugin_(plugin) {
    mLayer = this, mImpl = this;
    for (Tensor*& output : outputs_) output = new Tensor(DataType::kFLOAT, Dims{0, {}});
  }
  std::int32_t getNbOutputs() const noexcept override { return plugin_.getNbOutputs(); }
  ITensor* getOutput(std::int32_t index) const noexcept override { return outputs_[index]; }
  IPluginV2& getPlugin() noexcept override { return plugin_; }
  const char* getName() const noexcept override { return "a plugin"; }

 private:
  IPluginV2& plugin_;
  Tensor* outputs_[3];
};

class CastLayer final : public ICastLayer, public DefaultVLayer, public DefaultVCastLayer {
 public:
  CastLayer(ITensor& input, DataType type) : output_(type, input.getDimensions()) { mLayer = this, mImpl = this; }
  ITensor* getOutput(std::int32_t) const noexcept override { return const_cast<Tensor*>(&output_); }
  const char* getName() const noexcept override { return "a cast"; }

 private:
  Tensor output_;
};

class Builder final : public IBuilder, public DefaultVBuilder {
 public:
  Builder() { mImpl = this; }
  IPluginRegistry& getPluginRegistry() noexcept override { return *registry; }
  IPluginRegistry* registry = nullptr;
};

class Network final : public INetworkDefinition, public DefaultVNetworkDefinition {
 public:
  Network() { mImpl = this; }
  IBuilder& getBuilder() const noexcept override { return const_cast<Builder&>(builder); }
  Builder builder;
  ITensor* addInput(const char* name, DataType type, Dims dims) noexcept override {
    auto* tensor = new Tensor(type, dims);
    tensor->setName(name);
    return tensor;
  }
  ICastLayer* addCast(ITensor& input, DataType type) noexcept override {
    const Dims dims = input.getDimensions();
    std::printf("Cast %s %d", input.getName(), static_cast<int>(input.getType()));
    for (int i = 0; i < dims.nbDims; ++i) std::printf("%c%lld", i ? 'x' : ' ', static_cast<long long>(dims.d[i]));
    std::printf(" to %d\n", static_cast<int>(type));
    return new CastLayer(input, type);
  }
  IPluginV2Layer* addPluginV2(ITensor* const*, std::int32_t count, IPluginV2& plugin) noexcept override {
    std::string bytes(plugin.getSerializationSize(), '\0');
    plugin.serialize(bytes.data());
    std::printf("%s %d ", plugin.getPluginType(), count);
    for (const unsigned char byte : bytes) std::printf("%02x", byte);
    std::printf("\n");
    return new PluginLayer(plugin);
  }
};

void* open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library) std::fprintf(stderr, "%s\n", dlerror()), std::exit(2);
  return library;
}

}  // namespace

int main(int, char** argv) {
  for (char** path = argv + 5; *path; ++path) open(*path);
  open(argv[1]), open(argv[2]);
  const auto create = reinterpret_cast<void* (*)(void*, void*, int)>(dlsym(open(argv[3]), "createNvOnnxParser_INTERNAL"));
  static Messages messages;
  static Network network;
  const auto registry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
  network.builder.registry = registry();
  auto* parser = static_cast<nvonnxparser::IParser*>(create(&network, &messages, NV_ONNX_PARSER_VERSION));
  std::ifstream file(argv[4], std::ios::binary);
  const std::string model{std::istreambuf_iterator<char>(file), {}};
  const bool parsed = parser->parse(model.data(), model.size());
  for (int i = 0; i < parser->getNbErrors(); ++i) std::fprintf(stderr, "%s\n", parser->getError(i)->desc());
  std::fflush(stdout);
  std::_Exit(parsed ? 0 : 1);  // the parser would free tensors that it does not own here
}
