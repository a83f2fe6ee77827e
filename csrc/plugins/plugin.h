// PluginBase<Derived>: what TensorRT's plugin interfaces require and what is the same for all our plugins: names,
// fields, parsing, serialization, and a guard around every noexcept method. One derived class serves both generations:
// IPluginV3 for TensorRT 10 and newer, IPluginV2DynamicExt for 8.5 and 8.6.
//
// May not include torch, nor anything of csrc/cuda or csrc/engine.
//
// A Derived plugin has:
//   static constexpr const char* kName;                     the op_type of its ONNX node
//   static constexpr int kOutputs;
//   template <Plugin, Visitor> static void visit(Plugin&, Visitor&&)   its fields: visitor("name", plugin.member), …,
//                                                           last the ones that may be absent: visitor.optional(…)
//   void check() const                                      throws std::invalid_argument for impossible field values
//   static DataType output_type(int output)
//   void output_shapes(inputs, count, outputs, builder) const          throws for inputs of a wrong count, rank or size
//   bool supports(descs, position, inputs) const            the format and type of one tensor, given those before it
//   std::size_t workspace(inputs, count) const              bytes, for inputs of these (largest) sizes
//   void enqueue(input_descs, inputs, outputs, workspace, stream) const
// Any of them may throw: the message goes to TensorRT's logger, and the caller gets TensorRT's sign of failure.
//
// (The split of a plugin into capabilities is that of NVIDIA/TensorRT, plugin/roiAlignPlugin.)
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

static_assert(NV_TENSORRT_MAJOR >= 10 || (NV_TENSORRT_MAJOR == 8 && NV_TENSORRT_MINOR >= 5),
              "odtk needs TensorRT 8.5, 8.6, or 10 and newer");

namespace odtk {

constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";  // the one that the ONNX parser searches if a node names none

#if NV_TENSORRT_MAJOR >= 10
using PluginCreator = nvinfer1::IPluginCreatorInterface;
using PluginCreatorBase = nvinfer1::IPluginCreatorV3One;
#else
using PluginCreator = nvinfer1::IPluginCreator;
using PluginCreatorBase = nvinfer1::IPluginCreator;
#endif

/// Registers odtk's plugins in `registry`, except those that are already there. Throws std::runtime_error.
void register_plugins(nvinfer1::IPluginRegistry& registry);

/// Writes a line to the logger that TensorRT gives its plugins, else to its global logger, else to stderr.
void log_error(const std::string& message) noexcept;

/// Keeps the metadata that an engine carries in a plugin for take_metadata(): little-endian bytes, 4 in each number.
void keep_metadata(const std::vector<std::int32_t>& numbers);
/// The bytes that were kept last, once: "" when nothing was kept since the last call.
std::string take_metadata();

PluginCreator& decode_creator();
PluginCreator& nms_creator();

/// Runs `function`. If it throws, logs the message and returns `failure`.
template <typename Result, typename Function>
Result guarded(const char* plugin, Result failure, Function&& function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(std::string(plugin) + ": " + error.what());
  } catch (...) {
    log_error(std::string(plugin) + ": unknown exception");
  }
  return failure;
}

// ---------------------------------------------------------------------------------------------------------- fields

template <typename T>
struct FieldType;
template <>
struct FieldType<std::int32_t> {
  static constexpr auto kType = nvinfer1::PluginFieldType::kINT32;
  static constexpr const char* kName = "int32";
};
template <>
struct FieldType<float> {
  static constexpr auto kType = nvinfer1::PluginFieldType::kFLOAT32;
  static constexpr const char* kName = "float32";
};

/// Visitor: the fields of a plugin as TensorRT's list. The data pointers point into the plugin that was visited.
class FieldList {
 public:
  /// absent: list optional fields without a value too, as a creator does.
  explicit FieldList(bool absent = false) : absent_(absent) {}

  template <typename T>
  void operator()(const char* name, const T& value, const char* = nullptr) {
    fields_.emplace_back(name, &value, FieldType<T>::kType, 1);
  }
  template <typename T>
  void operator()(const char* name, const std::vector<T>& values) {
    fields_.emplace_back(name, values.data(), FieldType<T>::kType, static_cast<std::int32_t>(values.size()));
  }
  template <typename T>
  void optional(const char* name, const std::vector<T>& values) {
    if (absent_ || !values.empty()) (*this)(name, values);
  }

  std::vector<nvinfer1::PluginField>& fields() { return fields_; }
  const nvinfer1::PluginFieldCollection* collection() {
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  bool absent_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

/// Visitor: sets the fields of a plugin from TensorRT's list. Each must be there once, with the right type and length.
/// A field may have a former name, under which the engines of earlier versions hold it.
class FieldReader {
 public:
  explicit FieldReader(const nvinfer1::PluginFieldCollection& given) : given_(given) {}

  template <typename T>
  void operator()(const char* name, T& value, const char* former_name = nullptr) {
    if (former_name && !has(name) && has(former_name)) name = former_name;
    const std::vector<T> values = read<T>(name);
    if (values.size() != 1)
      throw std::invalid_argument(quoted(name) + " must be one number, not " + std::to_string(values.size()));
    value = values.front();
  }
  template <typename T>
  void operator()(const char* name, std::vector<T>& values) {
    values = read<T>(name);
  }
  template <typename T>
  void optional(const char* name, std::vector<T>& values) {
    if (has(name)) values = read<T>(name);
  }

  /// To be called after the visit. Throws if a field was given that the plugin does not have.
  void refuse_unread() const {
    for (std::int32_t i = 0; i < given_.nbFields; ++i) {
      const char* name = given_.fields[i].name;
      bool was_read = false;
      for (const std::string& one : read_) was_read = was_read || one == name;
      if (!was_read) throw std::invalid_argument(quoted(name) + " is not a field of this plugin");
    }
  }

 private:
  static std::string quoted(const char* name) { return std::string("field '") + (name ? name : "") + "'"; }

  bool has(const char* name) const {
    for (std::int32_t i = 0; i < given_.nbFields; ++i)
      if (given_.fields[i].name && std::strcmp(given_.fields[i].name, name) == 0) return true;
    return false;
  }

  const nvinfer1::PluginField& find(const char* name) {
    const nvinfer1::PluginField* found = nullptr;
    for (std::int32_t i = 0; i < given_.nbFields; ++i) {
      const nvinfer1::PluginField& field = given_.fields[i];
      if (!field.name) throw std::invalid_argument("a field without a name was given");
      if (std::strcmp(field.name, name) != 0) continue;
      if (found) throw std::invalid_argument(quoted(name) + " was given twice");
      found = &field;
    }
    if (!found) throw std::invalid_argument(quoted(name) + " is missing");
    if (!found->data || found->length < 1) throw std::invalid_argument(quoted(name) + " is empty");
    read_.push_back(name);
    return *found;
  }

  template <typename T>
  std::vector<T> read(const char* name) {
    const nvinfer1::PluginField& field = find(name);
    std::vector<T> values(static_cast<std::size_t>(field.length));
    if (field.type != FieldType<T>::kType)
      throw std::invalid_argument(quoted(name) + " must be " + FieldType<T>::kName + " (PluginFieldType " +
                                  std::to_string(static_cast<int>(FieldType<T>::kType)) + "), not PluginFieldType " +
                                  std::to_string(static_cast<int>(field.type)));
    std::memcpy(values.data(), field.data, values.size() * sizeof(T));
    return values;
  }

  const nvinfer1::PluginFieldCollection& given_;
  std::vector<std::string> read_;
};

/// Visitor: the fields as "name=1,2;name=3;…", without the optional ones, which change nothing that is timed.
class FieldText {
 public:
  template <typename T>
  void operator()(const char* name, const T& value, const char* = nullptr) {
    text_ << name << '=' << value << ';';
  }
  template <typename T>
  void operator()(const char* name, const std::vector<T>& values) {
    text_ << name << '=';
    for (const T& value : values) text_ << value << ',';
    text_ << ';';
  }
  template <typename T>
  void optional(const char*, const std::vector<T>&) {}
  std::string str() const { return text_.str(); }

 private:
  std::ostringstream text_;
};

/// Makes a plugin from its fields. Throws std::invalid_argument that names the field at fault.
template <typename Derived>
std::unique_ptr<Derived> create_plugin(const nvinfer1::PluginFieldCollection* fields) {
  if (!fields || (fields->nbFields > 0 && !fields->fields)) throw std::invalid_argument("no fields were given");
  auto plugin = std::make_unique<Derived>();
  FieldReader reader(*fields);
  Derived::visit(*plugin, reader);
  reader.refuse_unread();
  plugin->check();
  return plugin;
}

// ------------------------------------------------------------------------------------------------ plugin and creator

#if NV_TENSORRT_MAJOR >= 10

template <typename Derived>
class PluginBase : public nvinfer1::IPluginV3,
                   public nvinfer1::IPluginV3OneCore,
                   public nvinfer1::IPluginV3OneBuild,
                   public nvinfer1::IPluginV3OneRuntime {
 public:
  using DataType = nvinfer1::DataType;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded<nvinfer1::IPluginV3*>(Derived::kName, nullptr, [&] { return new Derived(self()); });
  }

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  std::int32_t getNbOutputs() const noexcept override { return Derived::kOutputs; }
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, std::int32_t,
                               const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) noexcept override {
    return 0;
  }
  std::int32_t getOutputDataTypes(DataType* types, std::int32_t count, const DataType*,
                                  std::int32_t) const noexcept override {
    for (std::int32_t i = 0; i < count; ++i) types[i] = Derived::output_type(i);
    return 0;
  }
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count, const nvinfer1::DimsExprs*,
                               std::int32_t, nvinfer1::DimsExprs* outputs, std::int32_t,
                               nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded<std::int32_t>(Derived::kName, -1, [&] {
      self().output_shapes(inputs, input_count, outputs, builder);
      return 0;
    });
  }
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t input_count, std::int32_t) noexcept override {
    return guarded(Derived::kName, false, [&] {
      std::vector<nvinfer1::PluginTensorDesc> descs;
      for (std::int32_t i = 0; i <= position; ++i) descs.push_back(tensors[i].desc);
      return self().supports(descs.data(), position, input_count);
    });
  }
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) const noexcept override {
    return guarded<std::size_t>(Derived::kName, 0, [&] {
      std::vector<nvinfer1::PluginTensorDesc> largest;
      for (std::int32_t i = 0; i < input_count; ++i) {
        largest.push_back(inputs[i].desc);
        largest.back().dims = inputs[i].max;
      }
      return self().workspace(largest.data(), input_count);
    });
  }
  const char* getTimingCacheID() noexcept override { return text(); }
  const char* getMetadataString() noexcept override { return text(); }

  // IPluginV3OneRuntime
  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, std::int32_t, const nvinfer1::PluginTensorDesc*,
                             std::int32_t) noexcept override {
    return 0;
  }
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override {
    return guarded<std::int32_t>(Derived::kName, -1, [&] {
      self().enqueue(input_descs, inputs, outputs, workspace, stream);
      return 0;
    });
  }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded<const nvinfer1::PluginFieldCollection*>(Derived::kName, nullptr, [&] {
      fields_ = FieldList();
      Derived::visit(self(), fields_);
      return fields_.collection();
    });
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  const char* text() noexcept {
    return guarded<const char*>(Derived::kName, nullptr, [&] {
      FieldText visitor;
      Derived::visit(self(), visitor);
      text_ = visitor.str();
      return text_.c_str();
    });
  }

  FieldList fields_;  // what getFieldsToSerialize() last returned
  std::string text_;
};

#else  // TensorRT 8.5, 8.6

template <typename Derived>
class PluginBase : public nvinfer1::IPluginV2DynamicExt {
 public:
  using DataType = nvinfer1::DataType;

  // IPluginV2
  const char* getPluginType() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  std::int32_t getNbOutputs() const noexcept override { return Derived::kOutputs; }
  std::int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete static_cast<Derived*>(this); }
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name ? name : ""; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  std::size_t getSerializationSize() const noexcept override { return bytes().size(); }
  void serialize(void* buffer) const noexcept override {
    const std::vector<char> data = bytes();
    std::memcpy(buffer, data.data(), data.size());
  }

  // IPluginV2Ext
  DataType getOutputDataType(std::int32_t output, const DataType*, std::int32_t) const noexcept override {
    return Derived::output_type(output);
  }

  // IPluginV2DynamicExt
  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return guarded<nvinfer1::IPluginV2DynamicExt*>(Derived::kName, nullptr, [&] { return new Derived(self()); });
  }
  nvinfer1::DimsExprs getOutputDimensions(std::int32_t output, const nvinfer1::DimsExprs* inputs,
                                          std::int32_t input_count, nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(Derived::kName, nvinfer1::DimsExprs{-1, {}}, [&] {
      nvinfer1::DimsExprs outputs[Derived::kOutputs];
      self().output_shapes(inputs, input_count, outputs, builder);
      return outputs[output];
    });
  }
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::PluginTensorDesc* tensors,
                                 std::int32_t input_count, std::int32_t) noexcept override {
    return guarded(Derived::kName, false, [&] { return self().supports(tensors, position, input_count); });
  }
  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, std::int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                       std::int32_t) noexcept override {}
  std::size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::PluginTensorDesc*, std::int32_t) const noexcept override {
    return guarded<std::size_t>(Derived::kName, 0, [&] { return self().workspace(inputs, input_count); });
  }
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override {
    return guarded<std::int32_t>(Derived::kName, -1, [&] {
      self().enqueue(input_descs, inputs, outputs, workspace, stream);
      return 0;
    });
  }

  /// The inverse of serialize(). Throws std::invalid_argument for bytes that this plugin did not write.
  static std::unique_ptr<Derived> from_bytes(const void* data, std::size_t size) {
    const Derived defaults;  // for the names and types of the fields
    FieldList required, list(true);
    Derived::visit(defaults, required);
    Derived::visit(defaults, list);
    std::int32_t count = 0;
    const char* at = static_cast<const char*>(data);
    const char* const end = at + size;
    for (nvinfer1::PluginField& field : list.fields()) {
      if (at == end && count >= required.collection()->nbFields) break;  // optional fields come last
      if (end - at < kElement) throw std::invalid_argument("the serialized plugin is cut short");
      std::memcpy(&field.length, at, kElement);
      at += kElement;
      if (field.length < 0 || (end - at) / kElement < field.length)
        throw std::invalid_argument("the serialized plugin is cut short");
      field.data = at;
      at += field.length * kElement;
      ++count;
    }
    if (at != end) throw std::invalid_argument("the serialized plugin is too long");
    const nvinfer1::PluginFieldCollection given{count, list.fields().data()};
    return create_plugin<Derived>(&given);
  }

 private:
  static constexpr std::ptrdiff_t kElement = 4;  // bytes of an int32 and of a float

  const Derived& self() const { return static_cast<const Derived&>(*this); }

  /// For each field, in the order of visit(): its length (int32), then its numbers.
  std::vector<char> bytes() const noexcept {
    FieldList list;
    Derived::visit(self(), list);
    std::vector<char> data;
    for (const nvinfer1::PluginField& field : list.fields()) {
      const auto* length = reinterpret_cast<const char*>(&field.length);
      const auto* numbers = static_cast<const char*>(field.data);
      data.insert(data.end(), length, length + kElement);
      data.insert(data.end(), numbers, numbers + field.length * kElement);
    }
    return data;
  }

  std::string namespace_ = kPluginNamespace;
};

#endif

/// What the registry holds: makes plugins of one class.
template <typename Derived>
class Creator : public PluginCreatorBase {
 public:
  Creator() { Derived::visit(defaults_, fields_); }

  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return fields_.collection(); }

#if NV_TENSORRT_MAJOR >= 10
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  Derived* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                        nvinfer1::TensorRTPhase) noexcept override {
    return create(fields);
  }
#else
  void setPluginNamespace(const char* name) noexcept override { namespace_ = name ? name : ""; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  Derived* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    return in_namespace(create(fields));
  }
  Derived* deserializePlugin(const char*, const void* data, std::size_t size) noexcept override {
    return in_namespace(
        guarded<Derived*>(Derived::kName, nullptr, [&] { return Derived::from_bytes(data, size).release(); }));
  }
#endif

 private:
  static Derived* create(const nvinfer1::PluginFieldCollection* fields) noexcept {
    return guarded<Derived*>(Derived::kName, nullptr, [&] { return create_plugin<Derived>(fields).release(); });
  }
#if NV_TENSORRT_MAJOR < 10
  Derived* in_namespace(Derived* plugin) const noexcept {
    if (plugin) plugin->setPluginNamespace(namespace_.c_str());
    return plugin;
  }
  std::string namespace_ = kPluginNamespace;
#endif

  Derived defaults_;  // the plugin whose fields are listed
  FieldList fields_{true};
};

}  // namespace odtk
