// Drives libodtk_plugins.so through a real TensorRT library, as a host would, without a GPU; tests/csrc/test_plugins.py
// compiles it against the headers of that TensorRT and reads what it prints.
//   plugins_probe NVINFER_LIBRARY PLUGIN_LIBRARY dlopen|loadLibrary      prints what the plugins answer
//   plugins_probe NVINFER_LIBRARY PLUGIN_LIBRARY run FILE…               runs one plugin for each file, see run()
// The plugin library is built with the emulated kernels (tests/emulation), so a plugin runs on host memory.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr bool kV3 = NV_TENSORRT_MAJOR >= 10;

#if NV_TENSORRT_MAJOR >= 10
using Creator = IPluginCreatorV3One;
using Plugin = IPluginV3;
using Size = std::int64_t;
#else
using Creator = IPluginCreator;
using Plugin = IPluginV2DynamicExt;
using Size = std::int32_t;
#endif

// ---- expressions: TensorRT hands them out while it builds a network, which needs a GPU; these compute the same ----

class Value final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Value(Size value) : value_(value) { IDimensionExpr::mImpl = this; }
  ~Value() noexcept override = default;
  bool isConstant() const override { return value_ >= 0; }
  Size getConstantValue() const override { return value_; }
#if NV_TENSORRT_MAJOR >= 10
  bool isSizeTensor() const override { return false; }
#endif

 private:
  Size value_;  // negative: known at run time only
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Builder() { IExprBuilder::mImpl = this; }
  ~Builder() noexcept override = default;
  const IDimensionExpr* constant(Size value) override {
    values_.emplace_back(value);
    return &values_.back();
  }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    if (!first.isConstant() || !second.isConstant()) return constant(-1);
    const Size a = first.getConstantValue(), b = second.getConstantValue();
    switch (op) {
      case DimensionOperation::kSUM: return constant(a + b);
      case DimensionOperation::kPROD: return constant(a * b);
      case DimensionOperation::kMIN: return constant(std::min(a, b));
      default: std::abort();
    }
  }
#if NV_TENSORRT_MAJOR >= 10
  const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    std::abort();
  }
#endif

 private:
  std::deque<Value> values_;
};

// ---- one plugin of either generation ----

std::string hex(const std::string& bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += "0123456789abcdef"[byte >> 4], text += "0123456789abcdef"[byte & 15];
  return text;
}

#if NV_TENSORRT_MAJOR >= 10
/// "name:type:data in hexadecimal"
std::vector<std::string> text_of_fields(const PluginFieldCollection& fields) {
  std::vector<std::string> all;
  for (int i = 0; i < fields.nbFields; ++i) {
    const PluginField& f = fields.fields[i];
    const std::string data(static_cast<const char*>(f.data), 4 * static_cast<std::size_t>(f.length));
    all.push_back(std::string(f.name) + ":" + std::to_string(static_cast<int>(f.type)) + ":" + hex(data));
  }
  return all;
}
#endif

std::string join(const std::vector<std::string>& parts) {
  std::string all;
  for (const std::string& part : parts) all += (all.empty() ? "" : " ") + part;
  return all;
}

class Probe {
 public:
  Probe(Creator& creator, Plugin* plugin) : creator_(creator), plugin_(plugin) {}

  /// Sizes, -1 for a dynamic one; an empty line when the plugin refuses.
  std::string shapes(const std::vector<std::vector<Size>>& inputs) {
    Builder builder;
    std::vector<DimsExprs> in;
    for (const auto& sizes : inputs) {
      DimsExprs dims{static_cast<std::int32_t>(sizes.size()), {}};
      for (std::size_t i = 0; i < sizes.size(); ++i) dims.d[i] = builder.constant(sizes[i]);
      in.push_back(dims);
    }
    const auto count = static_cast<std::int32_t>(in.size());
    std::vector<DimsExprs> out(3);
#if NV_TENSORRT_MAJOR >= 10
    if (build()->getOutputShapes(in.data(), count, nullptr, 0, out.data(), 3, builder) != 0) return "";
#else
    for (int i = 0; i < 3; ++i) out[i] = plugin_->getOutputDimensions(i, in.data(), count, builder);
    if (out[0].nbDims < 0) return "";
#endif
    std::string line;
    for (const DimsExprs& dims : out) {
      line += line.empty() ? "" : " ";
      for (int i = 0; i < dims.nbDims; ++i)
        line += (i ? "x" : "") + (dims.d[i]->isConstant() ? std::to_string(dims.d[i]->getConstantValue()) : "N");
    }
    return line;
  }

  std::string types() {
    std::vector<DataType> types(3);
    const DataType inputs[] = {DataType::kHALF, DataType::kHALF, DataType::kFLOAT};
#if NV_TENSORRT_MAJOR >= 10
    build()->getOutputDataTypes(types.data(), 3, inputs, 3);
#else
    for (int i = 0; i < 3; ++i) types[i] = plugin_->getOutputDataType(i, inputs, 3);
#endif
    std::string line = std::to_string(outputs()) + ":";
    for (const DataType type : types) line += " " + std::to_string(static_cast<int>(type));
    return line;
  }

  int outputs() {
#if NV_TENSORRT_MAJOR >= 10
    return build()->getNbOutputs();
#else
    return plugin_->getNbOutputs();
#endif
  }

  /// Whether tensor `position` may have this type and format, the ones before it having theirs.
  bool supports(std::vector<std::pair<DataType, TensorFormat>> tensors, int inputs) {
    std::vector<PluginTensorDesc> descs;
    for (const auto& [type, format] : tensors) descs.push_back({Dims{}, type, format, 0.f});
    const auto position = static_cast<std::int32_t>(descs.size()) - 1;
#if NV_TENSORRT_MAJOR >= 10
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const PluginTensorDesc& desc : descs) dynamic.push_back({desc, {}, {}, {}});
    return build()->supportsFormatCombination(position, dynamic.data(), inputs, 3);
#else
    return plugin_->supportsFormatCombination(position, descs.data(), inputs, 3);
#endif
  }

  std::size_t workspace(const std::vector<std::vector<Size>>& inputs) {
    std::vector<PluginTensorDesc> descs;
    for (const auto& sizes : inputs) {
      PluginTensorDesc desc{Dims{}, DataType::kFLOAT, TensorFormat::kLINEAR, 0.f};
      desc.dims.nbDims = static_cast<std::int32_t>(sizes.size());
      std::copy(sizes.begin(), sizes.end(), desc.dims.d);
      descs.push_back(desc);
    }
    const auto count = static_cast<std::int32_t>(descs.size());
#if NV_TENSORRT_MAJOR >= 10
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (PluginTensorDesc desc : descs) {
      const Dims largest = desc.dims;
      desc.dims.d[0] = -1;  // as in a network with a dynamic batch
      dynamic.push_back({desc, largest, largest, largest});
    }
    return build()->getWorkspaceSize(dynamic.data(), count, nullptr, 3);
#else
    return plugin_->getWorkspaceSize(descs.data(), count, nullptr, 3);
#endif
  }

  /// All that the plugin would leave in an engine.
  std::string state() {
#if NV_TENSORRT_MAJOR >= 10
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return join(text_of_fields(*runtime->getFieldsToSerialize()));
#else
    std::string bytes(plugin_->getSerializationSize(), '\0');
    plugin_->serialize(bytes.data());
    return hex(bytes);
#endif
  }

  int enqueue(const std::vector<PluginTensorDesc>& inputs, const std::vector<PluginTensorDesc>& outputs,
              const std::vector<const void*>& in, const std::vector<void*>& out) {
    std::vector<std::vector<Size>> sizes;
    for (const PluginTensorDesc& desc : inputs) sizes.emplace_back(desc.dims.d, desc.dims.d + desc.dims.nbDims);
    void* memory = std::aligned_alloc(256, (workspace(sizes) + 255) / 256 * 256);
#if NV_TENSORRT_MAJOR >= 10
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const int status = runtime->enqueue(inputs.data(), outputs.data(), in.data(), out.data(), memory, nullptr);
#else
    const int status = plugin_->enqueue(inputs.data(), outputs.data(), in.data(), out.data(), memory, nullptr);
#endif
    std::free(memory);
    return status;
  }

  Plugin* clone() { return static_cast<Plugin*>(plugin_->clone()); }

  /// What a runtime makes of it; `cut` bytes (V2) or fields (V3) are left out.
  Plugin* deserialize(int cut = 0) {
#if NV_TENSORRT_MAJOR >= 10
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin_->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    PluginFieldCollection fields = *runtime->getFieldsToSerialize();
    fields.nbFields -= cut;
    return creator_.createPlugin("probe", &fields, TensorRTPhase::kRUNTIME);
#else
    std::string bytes(plugin_->getSerializationSize(), '\0');
    plugin_->serialize(bytes.data());
    return static_cast<Plugin*>(
        creator_.deserializePlugin("probe", bytes.data(), bytes.size() - static_cast<std::size_t>(cut)));
#endif
  }

 private:
#if NV_TENSORRT_MAJOR >= 10
  IPluginV3OneBuild* build() {
    return static_cast<IPluginV3OneBuild*>(plugin_->getCapabilityInterface(PluginCapabilityType::kBUILD));
  }
#endif
  Creator& creator_;
  Plugin* plugin_;
};

Plugin* create(Creator& creator, const std::vector<PluginField>& fields) {
  const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
#if NV_TENSORRT_MAJOR >= 10
  return creator.createPlugin("probe", &collection, TensorRTPhase::kBUILD);
#else
  return static_cast<Plugin*>(creator.createPlugin("probe", &collection));
#endif
}

// ---- what is printed ----

void print(const std::string& key, const std::string& value) { std::printf("%s=%s\n", key.c_str(), value.c_str()); }

void print_round_trip(const std::string& name, Creator& creator, Plugin* plugin) {
  Probe probe(creator, plugin);
  const std::string state = probe.state();
  print(name + ".state", state);
  print(name + ".deserialized", Probe(creator, probe.deserialize()).state() == state ? "same" : "different");
  print(name + ".cloned", Probe(creator, probe.clone()).state() == state ? "same" : "different");
  print(name + ".cut", probe.deserialize(1) ? "made" : "refused");
}

/// Prints whether a plugin is made; TensorRT's logger, or stderr, has the reason.
void print_creation(const std::string& key, Creator& creator, const std::vector<PluginField>& fields) {
  std::fprintf(stderr, "[%s]\n", key.c_str());
  print(key, create(creator, fields) ? "made" : "refused");
}

std::vector<PluginField> without(std::vector<PluginField> fields, std::size_t index) {
  fields.erase(fields.begin() + static_cast<std::ptrdiff_t>(index));
  return fields;
}
std::vector<PluginField> with(std::vector<PluginField> fields, std::size_t index, const void* data,
                              PluginFieldType type, int length) {
  fields[index] = PluginField(fields[index].name, data, type, length);
  return fields;
}

/// The same fields as an engine of an earlier version holds them: field `index` is named "values".
void print_former_name(const std::string& name, Creator& creator, std::vector<PluginField> fields, std::size_t index) {
  const PluginField field = fields[index];
  fields[index] = PluginField("values", field.data, field.type, field.length);
  print_creation(name + ".former_name", creator, fields);
  print(name + ".former_name.state", Probe(creator, create(creator, fields)).state());
  fields.push_back(field);
  print_creation(name + ".both_names", creator, fields);
}

void probe_decode(Creator& creator) {
  const std::int32_t strides[] = {8, 16}, two[] = {1, 1}, classes = 3, rotated = 6, fcos = 5, deltas = 4, distances = 7,
                     top_n = 100, zero = 0, many = 99999;
  const float threshold = 0.05f, bad_threshold = 1.5f;
  using T = PluginFieldType;
  const std::vector<PluginField> good = {{"strides", strides, T::kINT32, 2},
                                         {"classes", &classes, T::kINT32, 1},
                                         {"coder", &deltas, T::kINT32, 1},
                                         {"score_threshold", &threshold, T::kFLOAT32, 1},
                                         {"top_n", &top_n, T::kINT32, 1}};
  print_creation("decode.good", creator, good);
  for (std::size_t i = 0; i < good.size(); ++i)
    print_creation("decode.missing." + std::string(good[i].name), creator, without(good, i));
  print_creation("decode.float_classes", creator, with(good, 1, &threshold, T::kFLOAT32, 1));
  print_creation("decode.int_threshold", creator, with(good, 3, &classes, T::kINT32, 1));
  print_creation("decode.two_classes", creator, with(good, 1, two, T::kINT32, 2));
  print_creation("decode.zero_top_n", creator, with(good, 4, &zero, T::kINT32, 1));
  print_creation("decode.many_top_n", creator, with(good, 4, &many, T::kINT32, 1));
  print_creation("decode.zero_classes", creator, with(good, 1, &zero, T::kINT32, 1));
  print_creation("decode.zero_stride", creator, with(good, 0, &zero, T::kINT32, 1));
  print_creation("decode.null_strides", creator, with(good, 0, nullptr, T::kINT32, 2));
  print_creation("decode.bad_coder", creator, with(good, 2, &classes, T::kINT32, 1));
  print_creation("decode.bad_threshold", creator, with(good, 3, &bad_threshold, T::kFLOAT32, 1));
  std::vector<PluginField> extra = good;
  extra.emplace_back("top_k", &top_n, T::kINT32, 1);
  print_creation("decode.unknown", creator, extra);
  extra.back() = good.front();
  print_creation("decode.twice", creator, extra);
  print_creation("decode.empty", creator, {});
  print_former_name("decode", creator, good, 2);

  Plugin* plugin = create(creator, good);
  Probe probe(creator, plugin);
  // A = 2: 6 class and 8 box channels; level 0 has 6*4*5 = 120 candidates, of which 100 are kept, level 1 6*2*3 = 36.
  const auto inputs = [](Size n) {
    return std::vector<std::vector<Size>>{{n, 6, 4, 5}, {n, 6, 2, 3}, {n, 8, 4, 5}, {n, 8, 2, 3}, {2, 2, 4}};
  };
  print("decode.shapes", probe.shapes(inputs(-1)));
  print("decode.shapes.rotated",
        Probe(creator, create(creator, with(good, 2, &rotated, T::kINT32, 1)))
            .shapes({{-1, 6, 4, 5}, {-1, 6, 2, 3}, {-1, 12, 4, 5}, {-1, 12, 2, 3}, {2, 2, 4}}));
  print("decode.shapes.fcos", Probe(creator, create(creator, with(good, 2, &fcos, T::kINT32, 1)))
                                  .shapes({{-1, 3, 4, 5}, {-1, 3, 2, 3}, {-1, 5, 4, 5}, {-1, 5, 2, 3}, {2, 1, 4}}));
  print("decode.shapes.distances",
        Probe(creator, create(creator, with(good, 2, &distances, T::kINT32, 1)))
            .shapes({{-1, 3, 4, 5}, {-1, 3, 2, 3}, {-1, 4, 4, 5}, {-1, 4, 2, 3}, {2, 1, 4}}));
  auto wrong = inputs(-1);
  wrong.pop_back();
  std::fprintf(stderr, "[decode.shapes.no_anchors]\n");
  print("decode.shapes.no_anchors", probe.shapes(wrong));
  wrong = inputs(-1);
  wrong[3][1] = 9;
  std::fprintf(stderr, "[decode.shapes.channels]\n");
  print("decode.shapes.channels", probe.shapes(wrong));
  print("decode.types", probe.types());
  print("decode.workspace.1", std::to_string(probe.workspace(inputs(1))));
  print("decode.workspace.16", std::to_string(probe.workspace(inputs(16))));

  constexpr auto kFloat = DataType::kFLOAT;
  constexpr auto kHalf = DataType::kHALF;
  constexpr auto kLinear = TensorFormat::kLINEAR;
  constexpr auto kHwc8 = TensorFormat::kHWC8;
  const auto supports = [&](const char* key, std::vector<std::pair<DataType, TensorFormat>> tensors) {
    print(std::string("decode.supports.") + key, probe.supports(std::move(tensors), 5) ? "yes" : "no");
  };
  supports("float", {{kFloat, kLinear}});
  supports("half", {{kHalf, kLinear}});
  supports("half_hwc8", {{kHalf, kHwc8}});
  supports("float_hwc", {{kFloat, TensorFormat::kHWC}});
  supports("float_hwc8", {{kFloat, kHwc8}});
  supports("int8", {{DataType::kINT8, kLinear}});
  supports("mixed_logits", {{kHalf, kLinear}, {kFloat, kLinear}});
  supports("float_boxes", {{kHalf, kLinear}, {kHalf, kLinear}, {kFloat, kLinear}});
  supports("mixed_layouts", {{kHalf, kLinear}, {kHalf, kLinear}, {kHalf, kHwc8}});
  const std::vector<std::pair<DataType, TensorFormat>> heads(4, {kHalf, kLinear});
  const auto after = [&](std::vector<std::pair<DataType, TensorFormat>> more) {
    more.insert(more.begin(), heads.begin(), heads.end());
    return more;
  };
  supports("anchors", after({{kFloat, kLinear}}));
  supports("half_anchors", after({{kHalf, kLinear}}));
  supports("outputs", after({{kFloat, kLinear}, {kFloat, kLinear}, {kFloat, kLinear}, {DataType::kINT32, kLinear}}));
  supports("half_scores", after({{kFloat, kLinear}, {kHalf, kLinear}}));
  supports("float_classes", after({{kFloat, kLinear}, {kFloat, kLinear}, {kFloat, kLinear}, {kFloat, kLinear}}));
  print_round_trip("decode", creator, plugin);
}

void probe_nms(Creator& creator) {
  const std::int32_t box_values = 6, detections = 100, zero = 0, five = 5;
  const float threshold = 0.5f, bad_threshold = -0.1f;
  using T = PluginFieldType;
  const std::vector<PluginField> good = {{"box_values", &box_values, T::kINT32, 1},
                                         {"threshold", &threshold, T::kFLOAT32, 1},
                                         {"detections", &detections, T::kINT32, 1}};
  print_creation("nms.good", creator, good);
  for (std::size_t i = 0; i < good.size(); ++i)
    print_creation("nms.missing." + std::string(good[i].name), creator, without(good, i));
  print_creation("nms.bad_box_values", creator, with(good, 0, &five, T::kINT32, 1));
  print_creation("nms.bad_threshold", creator, with(good, 1, &bad_threshold, T::kFLOAT32, 1));
  print_creation("nms.zero_detections", creator, with(good, 2, &zero, T::kINT32, 1));
  print_former_name("nms", creator, good, 0);

  Plugin* plugin = create(creator, good);
  Probe probe(creator, plugin);
  print("nms.shapes", probe.shapes({{-1, 136}, {-1, 136, 6}, {-1, 136}}));
  std::fprintf(stderr, "[nms.shapes.values]\n");
  print("nms.shapes.values", probe.shapes({{-1, 136}, {-1, 136, 4}, {-1, 136}}));
  print("nms.types", probe.types());
  print("nms.workspace.1", std::to_string(probe.workspace({{1, 136}, {1, 136, 6}, {1, 136}})));
  print("nms.workspace.16", std::to_string(probe.workspace({{16, 136}, {16, 136, 6}, {16, 136}})));
  print_round_trip("nms", creator, plugin);

  std::vector<std::int32_t> numbers(5000);  // more than the metadata of 1,203 classes
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<std::int32_t>(i * 2654435761u);
  std::vector<PluginField> carrying = good;
  carrying.emplace_back("metadata", numbers.data(), T::kINT32, static_cast<std::int32_t>(numbers.size()));
  Plugin* carrier = create(creator, carrying);
  Probe carrier_probe(creator, carrier);
  const std::string state = carrier_probe.state();
  const std::string data(reinterpret_cast<const char*>(numbers.data()), 4 * numbers.size());
  print("nms.metadata.kept", state.find(hex(data)) != std::string::npos ? "yes" : "no");
  print("nms.metadata.only_adds", state.rfind(Probe(creator, create(creator, good)).state(), 0) == 0 ? "yes" : "no");
  print("nms.metadata.deserialized", Probe(creator, carrier_probe.deserialize()).state() == state ? "same" : "different");
  print("nms.metadata.cloned", Probe(creator, carrier_probe.clone()).state() == state ? "same" : "different");
  const float wrong = 1.f;
  carrying.back() = PluginField("metadata", &wrong, T::kFLOAT32, 1);
  print_creation("nms.metadata.float", creator, carrying);
}

/// Runs one plugin as FILE says, line by line: "plugin NAME"; "int NAME value…" and "float NAME value…", its fields;
/// "input TYPE FORMAT size… PATH" and "output TYPE size… PATH", raw memory of its tensors, TYPE and FORMAT as
/// TensorRT's numbers. Returns enqueue's status.
int run(IPluginRegistry& registry, const char* path) {
  std::deque<std::vector<std::int32_t>> integers;
  std::deque<std::vector<float>> floats;
  std::deque<std::string> names, files, memory;
  std::vector<PluginField> fields;
  std::vector<PluginTensorDesc> descs[2];
  std::vector<const void*> in;
  std::vector<void*> out;
  std::string plugin;
  std::ifstream script(path);
  for (std::string line; std::getline(script, line);) {
    std::istringstream words(line);
    std::string word, name;
    words >> word >> name;
    if (word == "plugin") {
      plugin = name;
    } else if (word == "int") {
      names.push_back(name);
      integers.emplace_back(std::istream_iterator<std::int32_t>(words), std::istream_iterator<std::int32_t>());
      const auto length = static_cast<std::int32_t>(integers.back().size());
      fields.emplace_back(names.back().c_str(), integers.back().data(), PluginFieldType::kINT32, length);
    } else if (word == "float") {
      names.push_back(name);
      floats.emplace_back(std::istream_iterator<float>(words), std::istream_iterator<float>());
      const auto length = static_cast<std::int32_t>(floats.back().size());
      fields.emplace_back(names.back().c_str(), floats.back().data(), PluginFieldType::kFLOAT32, length);
    } else {
      const bool input = word == "input";
      PluginTensorDesc desc{Dims{}, static_cast<DataType>(std::stoi(name)), TensorFormat::kLINEAR, 1.f};
      int format = 0;
      if (input && words >> format) desc.format = static_cast<TensorFormat>(format);
      while (words >> word && word[0] != '/') desc.dims.d[desc.dims.nbDims++] = std::stoi(word);
      std::size_t bytes = 4;
      for (int i = 0; i < desc.dims.nbDims; ++i) bytes *= static_cast<std::size_t>(desc.dims.d[i]);
      std::ifstream file(word, std::ios::binary);
      memory.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
      if (!input) memory.back().assign(bytes, '\xA5');  // every element must be written
      files.push_back(word);
      descs[input ? 0 : 1].push_back(desc);
      input ? in.push_back(memory.back().data()) : out.push_back(memory.back().data());
    }
  }
#if NV_TENSORRT_MAJOR >= 10
  auto* creator = static_cast<Creator*>(registry.getCreator(plugin.c_str(), "1", ""));
#else
  auto* creator = registry.getPluginCreator(plugin.c_str(), "1", "");
#endif
  Plugin* made = create(*creator, fields);
  if (!made) return 5;
  // As in an engine: what runs is a copy of what was deserialized.
  Probe probe(*creator, Probe(*creator, Probe(*creator, made).deserialize()).clone());
  const int status = probe.enqueue(descs[0], descs[1], in, out);
  for (std::size_t i = 0; i < memory.size(); ++i)
    if (std::find(out.begin(), out.end(), memory[i].data()) != out.end())
      std::ofstream(files[i], std::ios::binary).write(memory[i].data(), static_cast<std::streamsize>(memory[i].size()));
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  void* nvinfer = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!nvinfer) return std::fprintf(stderr, "%s\n", dlerror()), 3;
  const auto symbol = [&](const char* name) { return dlsym(nvinfer, name); };
  IPluginRegistry& registry = *reinterpret_cast<IPluginRegistry* (*)()>(symbol("getPluginRegistry"))();
  print("version", std::to_string(reinterpret_cast<std::int32_t (*)()>(symbol("getInferLibVersion"))()));
  print("generation", kV3 ? "3" : "2");
  void* loaded =
      std::strcmp(argv[3], "loadLibrary") == 0 ? registry.loadLibrary(argv[2]) : dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
  print("loaded", loaded ? "yes" : "no");
  if (std::strcmp(argv[3], "run") == 0) {
    for (int i = 4; i < argc; ++i)
      if (const int status = run(registry, argv[i])) return std::fprintf(stderr, "%s: %d\n", argv[i], status), 6;
    return 0;
  }
  for (const char* name : {"OdtkDecode", "OdtkNms"}) {
#if NV_TENSORRT_MAJOR >= 10
    IPluginCreatorInterface* found = registry.getCreator(name, "1", "");
#else
    IPluginCreator* found = registry.getPluginCreator(name, "1", "");
#endif
    print(std::string("creator.") + name, found ? "found" : "absent");
    if (!found) return 4;
    Creator& creator = static_cast<Creator&>(*found);
    print(std::string("fields.") + name, join([&] {
            std::vector<std::string> names;
            const PluginFieldCollection& fields = *creator.getFieldNames();
            for (int i = 0; i < fields.nbFields; ++i)
              names.push_back(std::string(fields.fields[i].name) + ":" +
                              std::to_string(static_cast<int>(fields.fields[i].type)));
            return names;
          }()));
    if (std::strcmp(name, "OdtkDecode") == 0)
      probe_decode(creator);
    else
      probe_nms(creator);
  }
  return 0;
}
