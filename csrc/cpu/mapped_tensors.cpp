// CPU tensors in memory of their own: what is freed is the system's again at once, and leaves no gap in malloc's heap.
#include <c10/core/CPUAllocator.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace samerge {
namespace {

#if __has_include(<sys/mman.h>)

constexpr size_t kLarge = size_t(1) << 20;

struct Mapping {
  void* at;
  size_t bytes;

  static void free(void* context) {
    Mapping* mapping = static_cast<Mapping*>(context);
    c10::profiledCPUMemoryReporter().Delete(mapping->at);
    munmap(mapping->at, mapping->bytes);
    delete mapping;
  }
};

class MappedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return small->allocate(bytes);
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return small->allocate(bytes);  // which says so where it has no memory either
#ifdef MADV_HUGEPAGE
    madvise(at, bytes, MADV_HUGEPAGE);
#endif
    c10::profiledCPUMemoryReporter().New(at, bytes);
    return {at, new Mapping{at, bytes}, &Mapping::free, c10::DeviceType::CPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  c10::Allocator* small = nullptr;
};

bool set_mapped(bool on) {
  static MappedAllocator mapped;
  c10::Allocator* const before = c10::GetCPUAllocator();
  if (on && before != &mapped) {
    mapped.small = before;
    c10::SetCPUAllocator(&mapped);
  } else if (!on && before == &mapped) {
    c10::SetCPUAllocator(mapped.small);
  }
  return before == &mapped;
}

#else
bool set_mapped(bool) { return false; }
#endif

}  // namespace

bool map_large_tensors(bool on) { return set_mapped(on); }

}  // namespace samerge
