// How odtk's plugins get into a plugin registry, and where their messages go. May include TensorRT and plugin.h, but no
// torch and nothing of csrc/cuda or csrc/engine. The same object serves
//   * libodtk_plugins.so in hosts that only dlopen it (Triton, DeepStream, LD_PRELOAD): registered when it is loaded;
//   * libodtk_plugins.so loaded by IPluginRegistry::loadLibrary (trtexec --dynamicPlugins): getCreators, setLoggerFinder;
//   * odtk._C, and C++ programs that link it: register_plugins().
// TensorRT is never linked. A host that needs the plugins has already loaded it as the full, the lean or the dispatch
// runtime, each of which has a registry. So one library serves them all, and it loads even where there is none.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <mutex>
#include <utility>

#include "plugin.h"

namespace odtk {
namespace {

nvinfer1::ILoggerFinder* logger_finder = nullptr;

/// A C function of the TensorRT library that this process has loaded, or nullptr.
void* find_symbol(const char* name) {
  if (void* symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  for (const char* stem : {"libnvinfer.so.", "libnvinfer_lean.so.", "libnvinfer_dispatch.so."})
    if (void* library = dlopen((stem + major).c_str(), RTLD_LAZY | RTLD_NOLOAD))
      if (void* symbol = dlsym(library, name)) return symbol;
  return nullptr;
}

nvinfer1::ILogger* find_logger() {
  if (logger_finder)
    if (nvinfer1::ILogger* logger = logger_finder->findLogger()) return logger;
  const auto get = reinterpret_cast<nvinfer1::ILogger* (*)()>(find_symbol("getLogger"));
  return get ? get() : nullptr;
}

std::array<PluginCreator*, 2>& creators() {
  static std::array<PluginCreator*, 2> all = {&decode_creator(), &nms_creator()};
  return all;
}

#if NV_TENSORRT_MAJOR >= 10
PluginCreator* registered(nvinfer1::IPluginRegistry& registry, PluginCreatorBase& creator) {
  return registry.getCreator(creator.getPluginName(), kPluginVersion, kPluginNamespace);
}
#else
PluginCreator* registered(nvinfer1::IPluginRegistry& registry, PluginCreatorBase& creator) {
  return registry.getPluginCreator(creator.getPluginName(), kPluginVersion, kPluginNamespace);
}
#endif

nvinfer1::IPluginRegistry* find_registry() {
  const auto get = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(find_symbol("getPluginRegistry"));
  return get ? get() : nullptr;
}

/// Whether the plugins were registered when this library was loaded, because TensorRT had been loaded before.
bool registered_at_load = [] {
  nvinfer1::IPluginRegistry* registry = find_registry();
  if (registry) register_plugins(*registry);
  return registry != nullptr;
}();

/// loadLibrary() registers the creators it gets and fails for those already registered, so what its own dlopen of this
/// library registered is taken back first.
void take_back() {
  if (!std::exchange(registered_at_load, false)) return;
  for (PluginCreator* creator : creators()) find_registry()->deregisterCreator(*creator);
}

}  // namespace

void log_error(const std::string& message) noexcept {
  if (nvinfer1::ILogger* logger = find_logger())
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  else
    std::fprintf(stderr, "%s\n", message.c_str());
}

namespace {

std::mutex metadata_mutex;
std::string kept_metadata;

}  // namespace

void keep_metadata(const std::vector<std::int32_t>& numbers) {
  if (numbers.empty()) return;
  std::string bytes;
  for (const std::int32_t number : numbers)
    for (int shift = 0; shift < 32; shift += 8)
      bytes += static_cast<char>(static_cast<std::uint32_t>(number) >> shift & 0xFF);
  const std::lock_guard<std::mutex> lock(metadata_mutex);
  kept_metadata = std::move(bytes);
}

std::string take_metadata() {
  const std::lock_guard<std::mutex> lock(metadata_mutex);
  return std::exchange(kept_metadata, {});
}

void register_plugins(nvinfer1::IPluginRegistry& registry) {
  for (PluginCreator* creator : creators()) {
    auto& base = static_cast<PluginCreatorBase&>(*creator);
    if (registered(registry, base)) continue;
    if (!registry.registerCreator(*creator, kPluginNamespace))
      throw std::runtime_error(std::string("TensorRT refused to register the plugin ") + base.getPluginName());
  }
}

}  // namespace odtk

#define ODTK_EXPORT extern "C" __attribute__((visibility("default")))

/// Called by IPluginRegistry::loadLibrary.
ODTK_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { odtk::logger_finder = finder; }

#if NV_TENSORRT_MAJOR >= 10
ODTK_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
#else
ODTK_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(std::int32_t& count) {
#endif
  odtk::take_back();
  count = static_cast<std::int32_t>(odtk::creators().size());
  return odtk::creators().data();
}
