// Scratch memory in two phases: one carving function first measures, then hands out the pieces.
// Plain C++ that includes nothing of CUDA, TensorRT or torch.
//
//   Buffers carve(const Params& p, Workspace& w) { return {w.take<int>(p.batch), w.take<float>(p.count)}; }
//   size:  Workspace w;            carve(p, w);  bytes = w.size();
//   run:   Workspace w(pointer);   Buffers b = carve(p, w);
//
// (The idea is that of NVIDIA/cccl, cub/util_temporary_storage.cuh.)
#pragma once

#include <cstddef>
#include <cstdint>

namespace odtk {

class Workspace {
 public:
  /// Every piece starts at a multiple of this many bytes from the base. The base must be aligned to it too, as memory
  /// from cudaMalloc, torch's allocator and TensorRT's workspace is.
  static constexpr std::size_t kAlignment = 256;

  /// Without a base it only measures: take() returns null pointers.
  explicit Workspace(void* base = nullptr) : base_(static_cast<std::uint8_t*>(base)) {}

  /// The next `count` elements of T, uninitialized; null while measuring.
  template <typename T>
  T* take(std::size_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    size_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  /// Bytes taken so far.
  std::size_t size() const { return size_; }

 private:
  std::uint8_t* base_;
  std::size_t size_ = 0;
};

}  // namespace odtk
