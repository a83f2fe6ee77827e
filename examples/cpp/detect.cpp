// detect MODEL.plan IMAGE.ppm: loads an engine and prints the boxes of one image.
// The image (8-bit RGB, "P6") must not be larger than the engine's input; `convert photo.jpg -resize 1280x1280 photo.ppm`
// makes one. The engine takes uint8, as `odtk export` writes it by default.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "cuda/check.h"
#include "engine/engine.h"

/// The pixel around an image, by the metadata: black, or for models that were padded with zero after normalization the
/// nearest pixel to their mean. Metadata of several hundred classes is compressed, and not read here.
static std::array<int, 3> padding_of(const std::string& metadata) {
  if (metadata.empty() || metadata[0] != '{') {
    std::fprintf(stderr, "detect: the metadata is compressed; the image is padded with black\n");
    return {};
  }
  std::array<double, 3> mean{};
  const auto at = metadata.find("\"mean\":[");
  if (at == std::string::npos || metadata.find("\"padding\":\"mean\"") == std::string::npos) return {};
  if (std::sscanf(metadata.c_str() + at, "\"mean\":[%lf,%lf,%lf]", &mean[0], &mean[1], &mean[2]) != 3)
    throw std::invalid_argument("the engine's metadata has no mean: export the model again");
  std::array<int, 3> pixel{};
  for (std::size_t c = 0; c < 3; ++c) pixel[c] = static_cast<int>(std::nearbyint(255 * mean[c]));
  return pixel;
}

/// Writes the image into the upper left corner of `input` [3, height, width] and `padding` into the rest.
static void read_image(const char* path, std::uint8_t* input, long height, long width, std::array<int, 3> padding) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  long w = 0, h = 0, max_value = 0;
  file >> magic >> w >> h >> max_value;
  if (magic != "P6" || max_value != 255 || w > width || h > height)
    throw std::invalid_argument(std::string(path) + " is not an 8-bit P6 image that fits into the engine's input");
  file.get();
  for (long c = 0; c < 3; ++c)
    std::fill_n(input + c * height * width, height * width, static_cast<std::uint8_t>(padding[static_cast<std::size_t>(c)]));
  for (long y = 0; y < h; ++y)
    for (long x = 0; x < w; ++x)
      for (long c = 0; c < 3; ++c)
        input[(c * height + y) * width + x] = static_cast<std::uint8_t>(file.get());
}

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: detect MODEL.plan IMAGE.ppm\n"), 2;
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
  odtk::Engine engine(plan.data(), plan.size());

  std::map<std::string, odtk::Binding> tensors;  // for batch 1, in memory that host and device share
  for (const odtk::TensorInfo& info : engine.tensors()) {
    odtk::Binding& tensor = tensors[info.name];
    tensor.shape = info.shape;
    tensor.shape[0] = 1;
    if (info.input && info.type != "uint8")
      throw std::invalid_argument("the engine takes " + info.type + ": export the model again with --input-type uint8");
    std::size_t bytes = info.input ? 1 : 4;  // of one element: uint8; float32 or int32
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::size_t>(size);
    ODTK_CHECK(cudaMallocManaged(&tensor.data, bytes));
    ODTK_CHECK(cudaMemset(tensor.data, 0, bytes));
  }
  ODTK_CHECK(cudaDeviceSynchronize());
  const odtk::Binding& images = tensors.at("images");
  read_image(argv[2], static_cast<std::uint8_t*>(images.data), images.shape[2], images.shape[3],
             padding_of(engine.metadata()));
  engine.infer(tensors, nullptr);
  ODTK_CHECK(cudaDeviceSynchronize());

  const auto* scores = static_cast<const float*>(tensors.at("scores").data);
  const auto* boxes = static_cast<const float*>(tensors.at("boxes").data);
  const auto* classes = static_cast<const std::int32_t*>(tensors.at("classes").data);
  const auto rows = tensors.at("boxes").shape[1], box_values = tensors.at("boxes").shape[2];
  for (std::int64_t i = 0; i < rows && scores[i] > 0; ++i) {
    std::printf("class %d %.3f:", classes[i], static_cast<double>(scores[i]));
    for (std::int64_t v = 0; v < box_values; ++v) std::printf(" %.1f", static_cast<double>(boxes[i * box_values + v]));
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "detect: %s\n", error.what());
  return 1;
}
