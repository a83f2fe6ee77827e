// Runs csrc/engine on a TensorRT (tensorrt.cpp) and a CUDA (below) that compute nothing and print how they are called.
// Each argument is a step: "build KEY=VALUE…", "append TEXT" (to the plan), "load", "capturing STREAM" and
// "infer BATCH STREAM graph|plain ADDRESS". What a step throws is printed after "error ".
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/decode.h"
#include "cuda/nms.h"
#include "engine/engine.h"

namespace {

long captured = 0, capturing = 0;
long last_graph = 0;

template <typename Handle>
Handle handle(long number) {
  return reinterpret_cast<Handle>(static_cast<std::uintptr_t>(number));
}
long number(const void* handle) { return static_cast<long>(reinterpret_cast<std::uintptr_t>(handle)); }

}  // namespace

const char* cudaGetErrorName(cudaError_t) { return "an error"; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, std::size_t size) {
  std::printf("allocate %zu\n", size);
  return *memory = handle<void*>(256), cudaSuccess;
}
cudaError_t cudaFree(void*) { return std::printf("free\n"), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = handle<cudaEvent_t>(1), cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) {
  return std::printf("record stream %ld\n", number(stream)), cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return std::printf("synchronize\n"), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = handle<cudaStream_t>(99), cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
  return std::printf("wait stream %ld\n", number(stream)), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool active = capturing != 0 && number(stream) == capturing;
  return *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  return *graph = handle<cudaGraph_t>(++captured), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  std::printf("graph %ld\n", number(graph));
  return *executable = handle<cudaGraphExec_t>(number(graph)), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return std::printf("destroy graph %ld\n", number(executable)), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return std::printf("launch graph %ld stream %ld\n", number(executable), number(stream)), cudaSuccess;
}

namespace odtk {  // the kernels, which no plugin is asked to run here

std::size_t decode_workspace(const DecodeParams&) { std::abort(); }
void decode(const DecodeParams&, float*, float*, std::int32_t*, void*, std::size_t, cudaStream_t) { std::abort(); }
std::size_t nms_workspace(const NmsParams&) { std::abort(); }
void nms(const NmsParams&, const float*, const float*, const std::int32_t*, float*, float*, std::int32_t*, void*,
         std::size_t, cudaStream_t) {
  std::abort();
}

}  // namespace odtk

namespace {

std::vector<char> build(std::istringstream& words) {
  odtk::BuildOptions options;
  std::string onnx;
  for (std::string word; words >> word;) {
    const std::string key = word.substr(0, word.find('=')), value = word.substr(word.find('=') + 1);
    if (key == "batch") std::sscanf(value.c_str(), "%d,%d,%d", &options.batch[0], &options.batch[1], &options.batch[2]);
    if (key == "tf32") options.tf32 = value == "1";
    if (key == "hardware") options.hardware_compatible = value == "1";
    if (key == "version") options.version_compatible = value == "1";
    if (key == "cache") options.timing_cache = value;
    if (key == "name") options.metadata = value;
    if (key == "name_size") options.metadata = std::string(std::stoul(value), 'x');
    if (key == "field") onnx += value + " ";
    if (key == "progress")
      options.progress = [](const std::string& phase, int step, int steps) {
        return std::printf("progress %s %d %d\n", phase.c_str(), step, steps) > 0;
      };
  }
  return odtk::build(onnx.data(), onnx.size(), options);
}

void infer(odtk::Engine& engine, std::istringstream& words) {
  long batch = 0, stream = 0, address = 0;
  std::string mode;
  words >> batch >> stream >> mode >> address;
  const odtk::Binding images{handle<void*>(address), {batch, 3}}, scores{handle<void*>(4096), {batch, 3}};
  engine.infer({{"images", images}, {"scores", scores}}, handle<cudaStream_t>(stream), mode == "graph");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<char> plan;
  std::unique_ptr<odtk::Engine> engine;
  for (int i = 1; i < argc; ++i) {
    std::istringstream words(argv[i]);
    std::string step, text;
    words >> step;
    std::printf("[%s]\n", argv[i]);
    try {
      if (step == "build") plan = build(words);
      if (step == "append") words.get(), std::getline(words, text), plan.insert(plan.end(), text.begin(), text.end());
      if (step == "length")  // of a trailer, 8 bytes
        for (long shift = 0, value = std::atol(argv[i] + 7); shift < 64; shift += 8)
          plan.push_back(static_cast<char>(value >> shift & 0xFF));
      if (step == "capturing") words >> capturing;
      if (step == "infer") infer(*engine, words);
      if (step != "load") continue;
      engine = std::make_unique<odtk::Engine>(plan.data(), plan.size());
      std::printf("metadata %s\nbatch %ld %ld\n", engine->metadata().c_str(), engine->batch().first,
                  engine->batch().second);
    } catch (const std::exception& error) {
      std::printf("error %s\n", error.what());
    }
  }
  std::printf("[end]\n");
  engine.reset();
  return 0;
}
