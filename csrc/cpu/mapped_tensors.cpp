// CPU tensors in memory of their own: what is freed is the system's again at once, and leaves no gap in malloc's heap.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <unordered_map>

namespace samerge {
namespace {

constexpr size_t kLarge = size_t(1) << 20;

// Stands before the allocator that it found, for good: oneDNN frees through the allocator in force what it got from it before.
class MappedAllocator final : public c10::Allocator {
 public:
  static MappedAllocator& instance() {
    static MappedAllocator* const only = [] {
      auto* allocator = new MappedAllocator;
      c10::SetCPUAllocator(allocator);
      return allocator;
    }();
    return *only;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (!is_on || bytes < kLarge) return other_->allocate(bytes);
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return other_->allocate(bytes);  // which says so where it has no memory either
#ifdef MADV_HUGEPAGE
    madvise(at, bytes, MADV_HUGEPAGE);
#endif
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      bytes_[at] = bytes;
    }
    c10::profiledCPUMemoryReporter().New(at, bytes);
    return {at, at, &free, c10::DeviceType::CPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  std::atomic<bool> is_on{false};

 private:
  static void free(void* at) {
    MappedAllocator& self = instance();
    if (const size_t bytes = self.forget(at)) {
      c10::profiledCPUMemoryReporter().Delete(at);
      munmap(at, bytes);
    } else {
      self.other_->raw_deallocate(at);
    }
  }

  // The size of a mapping, 0 for what is none.
  size_t forget(void* at) {
    if (reinterpret_cast<uintptr_t>(at) % page_) return 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bytes_.find(at);
    if (found == bytes_.end()) return 0;
    const size_t bytes = found->second;
    bytes_.erase(found);
    return bytes;
  }

  c10::Allocator* const other_ = c10::GetCPUAllocator();
  const uintptr_t page_ = sysconf(_SC_PAGESIZE);
  std::mutex mutex_;
  std::unordered_map<void*, size_t> bytes_;
};

}  // namespace

bool map_large_tensors(bool on) { return MappedAllocator::instance().is_on.exchange(on); }

}  // namespace samerge
