// detect MODEL.plan IMAGE.ppm: loads an engine and prints the boxes of one image.
// The image (8-bit RGB, "P6") must not be larger than the engine's input; `convert photo.jpg -resize 1280x1280 photo.ppm`
// makes one.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "cuda/check.h"
#include "engine/engine.h"

/// Writes the normalized image into the upper left corner of `input` [3, height, width]; the rest stays zero.
static void read_image(const char* path, float* input, long height, long width) {
  const float mean[] = {0.485f, 0.456f, 0.406f}, deviation[] = {0.229f, 0.224f, 0.225f};  // ImageNet, values from 0 to 1
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  long w = 0, h = 0, max_value = 0;
  file >> magic >> w >> h >> max_value;
  if (magic != "P6" || max_value != 255 || w > width || h > height)
    throw std::invalid_argument(std::string(path) + " is not an 8-bit P6 image that fits into the engine's input");
  file.get();
  for (long y = 0; y < h; ++y)
    for (long x = 0; x < w; ++x)
      for (long c = 0; c < 3; ++c)
        input[(c * height + y) * width + x] = (static_cast<float>(file.get()) / 255.f - mean[c]) / deviation[c];
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
    std::size_t bytes = 4;  // of one element, which is float32 or int32
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::size_t>(size);
    ODTK_CHECK(cudaMallocManaged(&tensor.data, bytes));
    ODTK_CHECK(cudaMemset(tensor.data, 0, bytes));
  }
  ODTK_CHECK(cudaDeviceSynchronize());
  const odtk::Binding& images = tensors.at("images");
  read_image(argv[2], static_cast<float*>(images.data), images.shape[2], images.shape[3]);
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
