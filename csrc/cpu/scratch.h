#pragma once

#include <cstdint>
#include <memory>

namespace samerge {

// Memory of one thread, at a multiple of 64.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(new char[bytes + 63]) {}
  void* data() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) / 64 * 64); }

 private:
  std::unique_ptr<char[]> bytes_;
};

}  // namespace samerge
