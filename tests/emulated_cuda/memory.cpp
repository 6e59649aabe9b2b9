// Memory of the emulated device, and what kernels do with it. They are compiled with -fsanitize=thread, whose calls before every
// access are answered here: an access outside of what is allocated, or one that nothing orders after another thread's, ends the
// launch. When it is asked for, what every warp asks for is counted.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

#include "runtime.h"

using namespace emulated;

namespace {

// Who touched a byte when. It stands for all whom nothing has ordered since: the last one's time, one of the threads, and the
// scope that holds them all.
struct Stamp {
  uint64_t time : 32, thread : 28, scope : 3, atomic : 1;
};
struct Shadow {
  Stamp write, read;
};

struct Region {
  char* data;
  size_t bytes;
  bool shared;
  size_t grain = 16;  // bytes that have one shadow: as many as no access has touched a part of
  std::unique_ptr<Shadow[], decltype(&std::free)> shadows{nullptr, &std::free};

  bool holds(const char* at, size_t length) const { return at >= data && at + length <= data + bytes; }

  Shadow* shadows_of(const char* at, size_t length) {
    const size_t odd = (at - data) | length, whole = std::min(odd & -odd, grain), count = (bytes + whole - 1) / whole;
    if (!shadows || whole < grain) {
      auto* const finer = static_cast<Shadow*>(std::calloc(count, sizeof(Shadow)));
      for (size_t i = 0; shadows && i < count; ++i) finer[i] = shadows[i * whole / grain];
      shadows.reset(finer), grain = whole;
    }
    return &shadows[(at - data) / grain];
  }
};
std::map<const char*, Region> regions;
Region* recent[1024];  // by the place in the program that looked for it

// Before the first region that begins after the place.
Region* nearest(const char* at) {
  const auto after = regions.upper_bound(at);
  return after == regions.begin() ? nullptr : &std::prev(after)->second;
}

uintptr_t in_library(const void* pc) {
  Dl_info info;
  return dladdr(pc, &info) ? uintptr_t(pc) - uintptr_t(info.dli_fbase) : 0;
}

std::string source_line(const void* pc) {
  Dl_info info;
  dladdr(pc, &info);
  FILE* const pipe = popen(text("addr2line -s -e %s %lx", info.dli_fname, in_library(pc) - 1).c_str(), "r");
  char line[200] = "";
  if (pipe && fgets(line, sizeof line, pipe)) line[strcspn(line, " \n")] = 0;
  if (pipe) pclose(pipe);
  return line;
}

std::string name(const Stamp& s) {
  return text("block %lu thread %lu%s", s.thread / sizes[kBlock], s.thread % sizes[kBlock],
              s.scope ? " and others" : "");
}

// ------------------------------------------------------------------------------------------------------------------- races
struct Access {
  Region& region;
  bool write, atomic;
  uint64_t time;
  const void* pc;

  static Scope closest(uint64_t thread) {  // that holds the thread and the current one
    int scope = kThread;
    while (scope < kGrid && thread - current->first[scope] >= sizes[scope]) ++scope;
    return Scope(scope);
  }
  bool happened(const Stamp& other) const {
    if (other.time < (region.shared ? cluster_began : launch_began)) return true;
    const Scope scope = std::max(Scope(other.scope), closest(other.thread));
    return scope < kGrid && other.time < current->since[scope];
  }
  bool races(const Stamp& other) const { return !(atomic && other.atomic) && !happened(other); }

  void touch(Shadow& s) const {
    const bool wrote = races(s.write);
    if (wrote || (write && races(s.read)))
      fail("race at " + source_line(pc) + ": " + name(*current) + (write ? " writes" : " reads") + " what " +
           name(wrote ? s.write : s.read) + (wrote ? " wrote" : " read") + " without a meeting since");
    Stamp& mine = write ? s.write : s.read;
    if (happened(mine))
      mine = {time, current->id, kThread, atomic};
    else
      mine.time = time, mine.scope = std::max(Scope(mine.scope), closest(mine.thread)), mine.atomic &= atomic;
  }
};

// ----------------------------------------------------------------------------------------------------------------- traffic
struct Traffic {
  const void* kernel;
  bool shared, write;
  size_t requests, asked, unique, units,
      least;  // units: sectors of 32 bytes, or turns that the banks of shared memory take
};
std::map<std::pair<uint64_t, const void*>, Traffic> traffic;  // by launch and place in the program
std::string launches;
std::vector<void*> freed;  // while traffic is kept: whoever looks at a launch afterwards finds what its kernels did

struct Request {  // of a warp: its lanes' n-th access at one place
  bool shared, write;
  size_t unique;
  std::map<uintptr_t, size_t> parts;
};
std::map<std::pair<const void*, int>, Request> requests;
std::map<const void*, int> turns[kLanes];

void note(const Region& region, uintptr_t at, size_t bytes, bool write, const void* pc, size_t unique) {
  Request& request = requests[{pc, turns[current->lane()][pc]++}];
  request.shared = region.shared, request.write = write, request.unique += unique;
  size_t& part = request.parts[at];
  part = std::max(part, bytes);
}

// ---------------------------------------------------------------------------------------------------------------- accesses
void access(const void* place, size_t bytes, bool write, bool whole, const void* pc, uint64_t time = 0,
            bool atomic = false) {
  const char* const at = static_cast<const char*>(place);
  if (!current || (at >= stacks && at < stacks + kStacks)) return;
  const auto refuse = [&](const char* what, const std::string& detail = "") {
    fail(text("%s of %zu bytes %s at %s: %s", write ? "write" : "read", bytes, what, source_line(pc).c_str(),
              name(*current).c_str()) +
         detail);
  };
  if (whole && uintptr_t(at) % bytes) refuse("misaligned");
  Region*& region = recent[uintptr_t(pc) / 4 % std::size(recent)];
  if (!region || !region->holds(at, bytes)) region = nearest(at);
  if (!region || !region->holds(at, bytes))
    refuse("out of bounds", region ? text(", %td bytes into %zu", at - region->data, region->bytes) : "");
  if (!emulated_device.watched && !emulated_device.counted) return;
  Shadow* const shadows = region->shadows_of(at, bytes);
  const Access mine = {*region, write, atomic, time ? time : now, pc};
  size_t unique = 0;
  for (size_t i = 0; i < bytes / region->grain; ++i) {
    unique += (write ? shadows[i].write : shadows[i].read).time < launch_began ? region->grain : 0;
    mine.touch(shadows[i]);
  }
  if (emulated_device.counted) note(*region, uintptr_t(at), bytes, write, pc, unique);
}

}  // namespace

namespace emulated {

void require_global(const void* place, const char* file, int line) {
  const char* const at = static_cast<const char*>(place);
  const Region* const region = nearest(at);
  if (region && region->holds(at, 1) && region->shared)
    fail(text("global memory is asked for a place in shared memory at %s:%d: ", file, line) + name(*current));
}

void* allocated(size_t bytes, bool shared) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  char* const data =
      static_cast<char*>(std::aligned_alloc(512, (bytes + 1023) / 512 * 512));  // at least 512 bytes apart
  if (data) regions[data] = {data, bytes, shared};
  return data;
}
void released(void* data) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  regions.erase(static_cast<char*>(data));
  std::fill(std::begin(recent), std::end(recent), nullptr);
  if (emulated_device.counted)
    freed.push_back(data);
  else
    std::free(data);
}

void count() {
  for (const auto& [key, request] : requests) {
    std::map<uintptr_t, int> units;  // sectors, or the words of each bank
    size_t distinct = 0;
    int most = 1;
    for (const auto& [at, bytes] : request.parts) {
      distinct += bytes;
      const size_t size = request.shared ? 4 : 32;
      for (uintptr_t unit = at / size; unit <= (at + bytes - 1) / size; ++unit)
        most = std::max(most, units[request.shared ? unit % 32 : unit] += at % size == 0);
    }
    Traffic& t = traffic[{launch_began, key.first}];
    t.kernel = launch_now.kernel, t.shared = request.shared, t.write = request.write;
    ++t.requests, t.asked += distinct, t.unique += request.unique;
    t.units += request.shared ? most : units.size();
    t.least += (distinct + (request.shared ? 127 : 31)) / (request.shared ? 128 : 32);
  }
  requests.clear();
  for (auto& of_lane : turns) of_lane.clear();
}

void copy_async(void* to, const void* from, size_t bytes) {
  const char* const pc = static_cast<const char*>(__builtin_return_address(0));
  access(from, bytes, false, true, pc);
  access(to, bytes, true, true, pc + 1, kNever);  // until it is waited for, nothing comes after it
  current->copies.push_back({to, from, bytes, current->group});
}
void commit_copies() { ++current->group; }
void wait_for_copies(int but_last_groups) {
  std::vector<Copy> left;
  for (const Copy& copy : std::exchange(current->copies, {})) {
    if (copy.group >= current->group - but_last_groups) {
      left.push_back(copy);
      continue;
    }
    const char* const to = static_cast<char*>(copy.to);
    memcpy(copy.to, copy.from, copy.bytes);
    Region& region = *nearest(to);
    Shadow* const shadows = region.shadows_of(to, copy.bytes);
    for (size_t i = 0; i < copy.bytes / region.grain; ++i) shadows[i].write = {now, current->id, kThread, false};
  }
  current->copies = std::move(left);
}

void keep(const Launch& l, const void* arguments, size_t bytes) {
  if (!emulated_device.counted) return;
  launches += text("%lx\t%u %u %u\t%u %u %u\t%zu\t", in_library(l.kernel), l.grid.x, l.grid.y, l.grid.z, l.block.x,
                   l.block.y, l.block.z, l.shared_bytes);
  for (size_t i = 0; i < bytes; ++i) launches += text("%02x", static_cast<const unsigned char*>(arguments)[i]);
  launches += "\n";
}

void atomic(const void* place, size_t bytes, const void* pc) {
  access(place, bytes, false, true, pc, 0, true);
  access(place, bytes, true, true, static_cast<const char*>(pc) + 1, 0, true);
}

}  // namespace emulated

extern "C" {

void emulated_forget() {
  traffic.clear(), launches.clear();
  for (void* data : std::exchange(freed, {})) std::free(data);
}

// For emulated_cuda.py: since the last call, a line for each launch and place in the program, tab-separated.
const char* emulated_traffic() {
  static std::string lines;
  lines.clear();
  for (const auto& [key, t] : std::exchange(traffic, {}))
    lines += text("%lu\t%lx\t%lx\t%d\t%d\t%zu\t%zu\t%zu\t%zu\t%zu\n", key.first, in_library(t.kernel),
                  in_library(key.second), t.shared, t.write, t.requests, t.asked, t.unique, t.units, t.least);
  return lines.c_str();
}

// Likewise, a line for each launch: kernel, grid, block, bytes of shared memory, arguments.
const char* emulated_launches() {
  static std::string lines;
  lines = std::exchange(launches, {});
  return lines.c_str();
}

#define EMULATED_ACCESSES(bytes)                                                                                \
  void __tsan_read##bytes(void* at) { access(at, bytes, false, true, __builtin_return_address(0)); }            \
  void __tsan_write##bytes(void* at) { access(at, bytes, true, true, __builtin_return_address(0)); }            \
  void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, false, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, true, false, __builtin_return_address(0)); }
EMULATED_ACCESSES(1)
EMULATED_ACCESSES(2)
EMULATED_ACCESSES(4)
EMULATED_ACCESSES(8)
EMULATED_ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { access(at, bytes, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { access(at, bytes, true, false, __builtin_return_address(0)); }
void __tsan_init() {}
}
