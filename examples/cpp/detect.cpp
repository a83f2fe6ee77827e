// detect BUNDLE IMAGE.ppm: runs the engine of a folder of `odtk export --bundle`, and prints the objects in one image.
// It needs the folder, TensorRT (8.6 or newer) and CUDA, and nothing else of odtk. The image (8-bit RGB, "P6") must not
// be larger than the model's input; `convert photo.jpg -resize 1280x1280 photo.ppm` makes one.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Bytes = std::vector<char>;

static std::runtime_error failure(const std::string& sentence) { return std::runtime_error(sentence); }

static void check(cudaError_t status) {
  if (status != cudaSuccess) throw failure(std::string("CUDA failed: ") + cudaGetErrorString(status));
}

static Bytes read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw failure("there is no file " + path.string() + " that can be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

static std::string sha256(const Bytes& bytes) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned size = 0;
  if (!EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr))
    throw failure("OpenSSL has no SHA-256");
  std::string text;
  for (unsigned i = 0; i < size; ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned>(digest[i]));
    text += two;
  }
  return text;
}

static nlohmann::json read_manifest(const fs::path& folder) {
  const fs::path path = folder / "manifest.json";
  try {
    const Bytes text = read(path);
    nlohmann::json manifest = nlohmann::json::parse(text.begin(), text.end());
    if (manifest.at("kind") != "odtk bundle" || manifest.at("schema") != 1)
      throw failure(path.string() + " is not the manifest of a bundle that this program knows");
    manifest.at("metadata");  // bundles of early versions have none
    return manifest;
  } catch (const nlohmann::json::exception&) {
    throw failure(path.string() + " is damaged, or of another odtk: export the bundle again");
  }
}

/// A file of the bundle, which must be as it was written.
static Bytes read_checked(const fs::path& folder, const nlohmann::json& manifest, const std::string& name) {
  if (!manifest.at("files").contains(name))
    throw failure("the bundle has no " + name + ": export it where the GPU and TensorRT are");
  Bytes content = read(folder / name);
  if (sha256(content) != manifest["files"][name].at("sha256"))
    throw failure((folder / name).string() + " is not as it was written: copy the whole bundle again");
  return content;
}

static std::vector<std::string> read_lines(const Bytes& text) {
  std::vector<std::string> lines(1);
  for (const char c : text) c == '\n' ? void(lines.emplace_back()) : lines.back().push_back(c);
  return lines;
}

struct Input {
  long height, width;                 // of the model's input
  std::array<std::uint8_t, 3> beyond;  // the pixel of the padding
};

static Input input_of(const nlohmann::json& metadata) {
  if (metadata.at("input_type") != "uint8")
    throw failure("the model takes no uint8: export the bundle again with --input-type uint8");
  Input input{metadata.at("size")[0], metadata.at("size")[1], {}};
  if (metadata.at("padding") == "mean")  // after normalization it is zero
    for (std::size_t c = 0; c < 3; ++c)
      input.beyond[c] = static_cast<std::uint8_t>(std::nearbyint(255 * metadata.at("mean")[c].get<double>()));
  return input;
}

struct Image {
  Bytes planes;  // [3, height, width] of the input: the image in the upper left corner
  long width, height;
};

static Image read_image(const fs::path& path, const Input& input) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  long w = 0, h = 0, largest = 0;
  file >> magic >> w >> h >> largest;
  if (magic != "P6" || largest != 255 || w < 1 || h < 1 || w > input.width || h > input.height)
    throw failure(path.string() + " is no 8-bit P6 image of at most " + std::to_string(input.width) + "x" +
                  std::to_string(input.height) + " pixels");
  file.get();
  const auto plane = static_cast<std::size_t>(input.height * input.width);
  Image image{Bytes(3 * plane), w, h};
  for (std::size_t c = 0; c < 3; ++c)
    std::fill_n(image.planes.begin() + static_cast<std::ptrdiff_t>(c * plane), plane, static_cast<char>(input.beyond[c]));
  for (long y = 0; y < h; ++y)
    for (long x = 0; x < w; ++x)
      for (std::size_t c = 0; c < 3; ++c)
        image.planes[c * plane + static_cast<std::size_t>(y * input.width + x)] = static_cast<char>(file.get());
  if (!file) throw failure(path.string() + " ends too early");
  return image;
}

class Logger final : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", message);
  }
};

/// A tensor of one image, in memory that host and device share.
struct Tensor {
  void* data = nullptr;
  std::vector<std::int64_t> shape;
  ~Tensor() { cudaFree(data); }
};

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: detect BUNDLE IMAGE.ppm\n"), 2;
  const fs::path folder = argv[1];
  const nlohmann::json manifest = read_manifest(folder);
  const Bytes plan = read_checked(folder, manifest, "model.plan");
  read_checked(folder, manifest, "libodtk_plugins.so");
  const std::vector<std::string> labels = read_lines(read_checked(folder, manifest, "labels.txt"));
  const Input input = input_of(manifest["metadata"]);
  const Image image = read_image(argv[2], input);

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices)
    throw failure("an engine needs a GPU, and CUDA finds none: does nvidia-smi show one?");
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) throw failure("TensorRT does not start");
  // TensorRT is loaded now, so that the library registers its plugins by itself.
  if (!dlopen(fs::absolute(folder / "libodtk_plugins.so").c_str(), RTLD_NOW))
    throw failure(std::string("the plugins cannot be loaded: ") + dlerror());
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) throw failure("TensorRT refuses model.plan: export the bundle on this machine");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  if (!context) throw failure("TensorRT cannot make a context for model.plan: is the GPU's memory full?");

  std::map<std::string, Tensor> tensors;
  for (std::int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
    const char* name = engine->getIOTensorName(i);
    const bool given = engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    nvinfer1::Dims shape = engine->getTensorShape(name);
    shape.d[0] = 1;
    if (given && !context->setInputShape(name, shape)) throw failure("model.plan takes no single image");
    Tensor& tensor = tensors[name];
    tensor.shape.assign(shape.d, shape.d + shape.nbDims);
    std::size_t bytes = given ? 1 : 4;  // of one element: uint8; float32 or int32
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::size_t>(size);
    check(cudaMallocManaged(&tensor.data, bytes, cudaMemAttachGlobal));
    context->setTensorAddress(name, tensor.data);
    if (given && bytes != image.planes.size()) throw failure("the input of model.plan is not the one in manifest.json");
    if (given) std::copy(image.planes.begin(), image.planes.end(), static_cast<char*>(tensor.data));
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  if (!context->enqueueV3(stream)) throw failure("TensorRT cannot run model.plan");
  check(cudaStreamSynchronize(stream));

  const auto* scores = static_cast<const float*>(tensors.at("scores").data);
  const auto* boxes = static_cast<const float*>(tensors.at("boxes").data);
  const auto* classes = static_cast<const std::int32_t*>(tensors.at("classes").data);
  const std::int64_t rows = tensors.at("boxes").shape.at(1), values = tensors.at("boxes").shape.at(2);
  for (std::int64_t i = 0; i < rows && scores[i] > 0; ++i) {  // x1 y1 x2 y2, and sin cos of a rotated box
    const float* box = boxes + i * values;
    if (values == 4 && (box[0] >= static_cast<float>(image.width) || box[1] >= static_cast<float>(image.height)))
      continue;  // it lies in the padding
    std::printf("%s %.3f:", labels.at(static_cast<std::size_t>(classes[i])).c_str(), static_cast<double>(scores[i]));
    for (std::int64_t v = 0; v < values; ++v) std::printf(" %.1f", static_cast<double>(box[v]));
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "detect: %s\n", error.what());
  return 1;
}
