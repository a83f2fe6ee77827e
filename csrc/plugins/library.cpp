// How odtk's plugins get into a plugin registry, and where their messages go. The same object serves
//   * libodtk_plugins.so for hosts that only dlopen it (Triton, DeepStream, LD_PRELOAD): registered when loaded;
//   * libodtk_plugins.so through IPluginRegistry::loadLibrary (trtexec --dynamicPlugins): getCreators, setLoggerFinder;
//   * odtk._C and C++ programs that link it: register_plugins().
// TensorRT is never linked: a host that has plugins to register has loaded it already, under whichever name (the full,
// the lean and the dispatch runtime each bring a registry). So one library serves them all, and loads without any.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <utility>

#include "plugin.h"

namespace odtk {
namespace {

nvinfer1::ILoggerFinder* logger_finder = nullptr;

/// A C function of the TensorRT that this process has loaded, or nullptr.
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

/// Whether the plugins were registered when this library was loaded, because TensorRT was there.
bool registered_at_load = [] {
  nvinfer1::IPluginRegistry* registry = find_registry();
  if (registry) register_plugins(*registry);
  return registry != nullptr;
}();

/// loadLibrary() registers what it gets and fails for what is there: it must not find what its own dlopen registered.
void hand_over() {
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

void register_plugins(nvinfer1::IPluginRegistry& registry) {
  for (PluginCreator* creator : creators()) {
    auto& known = static_cast<PluginCreatorBase&>(*creator);
    if (registered(registry, known)) continue;
    if (!registry.registerCreator(*creator, kPluginNamespace))
      throw std::runtime_error(std::string("TensorRT refused to register the plugin ") + known.getPluginName());
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
  odtk::hand_over();
  count = static_cast<std::int32_t>(odtk::creators().size());
  return odtk::creators().data();
}
