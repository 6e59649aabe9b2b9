// A CUDA device on the CPU. Every thread of a cluster is a fibre, and clusters run one after another; where threads meet, the
// next of them goes on. The kernels are compiled with -fsanitize=thread, whose calls before every access are answered here:
// an access outside of what is allocated, or one that nothing orders after another thread's, ends the launch with a fault.
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "language.h"

using namespace emulated;

// What a test may choose; the names are those of emulated_cuda.py.
struct Device {
  int processors = 4, per_processor = 2, generation = 9, shared_bytes = 232448;
  int order = 0;  // of threads, warps and clusters: 0 forward, 1 backward, else random with this seed
  int poison = 0xff;
  int watched = 1;  // races are looked for
  int counted = 0;  // traffic is kept
};
extern "C" {
Device emulated_device;
}

namespace {

constexpr int kLanes = 32, kMostThreads = 1024, kMostBlocks = 8;  // of a block, of a cluster
constexpr size_t kStack = 64 << 10, kStacks = kStack * kMostThreads * kMostBlocks;
constexpr uint64_t kNever = (uint64_t(1) << 36) - 1;

// Who touched a byte when. Of reads it stands for all that nothing has ordered since: the last time, one of the threads, and
// the scope that holds them all.
struct Stamp {
  uint64_t time : 36, thread : 24, scope : 3, atomic : 1;
};
struct Shadow {
  Stamp write, read;
};

struct Region {
  uintptr_t begin;
  size_t bytes;
  bool shared;
  size_t grain = 16;  // bytes that share a shadow: as many as no access has touched a part of
  std::unique_ptr<Shadow[], decltype(&std::free)> shadows{nullptr, &std::free};

  Shadow* shadows_of(uintptr_t at, size_t touched) {
    const size_t odd = (at - begin) | touched, whole = std::min(odd & -odd, grain);
    if (!shadows || whole < grain) {
      auto* finer = static_cast<Shadow*>(std::calloc((bytes + whole - 1) / whole, sizeof(Shadow)));
      for (size_t i = 0; shadows && i < (bytes + whole - 1) / whole; ++i) finer[i] = shadows[i * whole / grain];
      shadows.reset(finer), grain = whole;
    }
    return &shadows[(at - begin) / grain];
  }
};
std::map<uintptr_t, Region> regions;
Region* recent[1024];  // by the place in the program that looked for it
std::mutex one_at_a_time;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};
struct Request {  // of a warp: its lanes' n-th access at one place of the program
  bool shared, write;
  size_t unique;
  std::map<uintptr_t, size_t> parts;
};
struct Warp {
  std::map<std::pair<const void*, int>, Request> requests;
  std::map<const void*, int> turn[kLanes];
};
struct Fibre {
  jmp_buf state;
  bool begun;
  uint3 thread, block;
  int lane, rank;  // in the warp; of the block in its cluster
  uint64_t id;             // in the launch
  uint64_t first[kGrid];   // the id of the first of each scope
  Warp* warp;
  uint64_t since[kGrid];  // what others of a scope did before this time has happened
  Scope waits;            // kThread: it runs. kGrid: it has ended
  unsigned mask;
  uint64_t value;
  int source, line, group;
  const char* file;
  std::vector<Copy> copies;
};

std::deque<Fibre> fibres;  // of a cluster, by block and thread
char* stacks;
Fibre* current;
jmp_buf scheduler;
Launch launch_now;
void (*call_now)(const void*);
const void* closure_now;
uint64_t now, launch_began, cluster_began, sizes[kGrid];  // threads of a scope
std::string fault_now;
cudaError_t last_error;
std::map<const void*, int> dynamic_limits;
std::vector<std::tuple<const void*, size_t, char*>> variables[kMostBlocks];  // __shared__, of each block of a cluster
std::minstd_rand random_number;

struct Traffic {
  const void* kernel;
  bool shared, write;
  size_t requests, asked, unique, units, least;  // units: sectors of 32 bytes, or turns that the banks of shared memory take
};
std::map<std::pair<int, const void*>, Traffic> traffic;
int launches;

// ------------------------------------------------------------------------------------------------------------------ faults
std::string text(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* pattern, ...) {
  char line[1000];
  va_list list;
  va_start(list, pattern);
  vsnprintf(line, sizeof line, pattern, list);
  va_end(list);
  return line;
}

uintptr_t in_library(const void* pc) {
  Dl_info info;
  return dladdr(pc, &info) ? uintptr_t(pc) - uintptr_t(info.dli_fbase) : 0;
}

std::string source_line(const void* pc) {
  Dl_info info;
  dladdr(pc, &info);
  FILE* pipe = popen(text("addr2line -s -e %s %lx", info.dli_fname, in_library(pc) - 1).c_str(), "r");
  char line[200] = "";
  if (pipe && fgets(line, sizeof line, pipe)) line[strcspn(line, " \n")] = 0;
  if (pipe) pclose(pipe);
  return line;
}

std::string name(const Fibre& f) {
  return text("block (%u, %u, %u) thread %u", f.block.x, f.block.y, f.block.z, f.thread.x);
}
std::string name(const Stamp& s) {
  return text("block %lu thread %lu%s", s.thread / sizes[kBlock], s.thread % sizes[kBlock], s.scope ? " and others" : "");
}
std::string state(const Fibre& f) {
  static const char* const kStates[] = {"runs", "meets its warp", "meets its block", "meets its cluster", "has ended"};
  const std::string place = f.waits == kThread || f.waits == kGrid ? "" : text(" at %s:%d", f.file, f.line);
  return name(f) + " " + kStates[f.waits] + place + (f.waits == kWarp ? text(" with %08x", f.mask) : "");
}

void leave() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}
void fail(const std::string& what) {  // the first of a launch counts
  if (fault_now.empty()) fault_now = what;
  if (current) leave();
}

// ---------------------------------------------------------------------------------------------------------------- accesses
Scope closest(uint64_t thread, const Fibre& f) {
  int scope = kThread;
  while (scope < kGrid && thread - f.first[scope] >= sizes[scope]) ++scope;
  return Scope(scope);
}

struct Access {
  Region& region;
  bool write, atomic;
  uint64_t time;
  const void* pc;

  bool ordered(const Stamp& other) const {
    const uint64_t began = region.shared ? cluster_began : launch_began;
    if (other.time < began || (atomic && other.atomic)) return true;
    const Scope scope = std::max(Scope(other.scope), closest(other.thread, *current));
    return scope < kGrid && other.time < current->since[scope];
  }
  void touch(Shadow& s) const {
    const Stamp mine = {time, current->id, kThread, atomic};
    if (!ordered(s.write) || (write && !ordered(s.read)))
      fail("race at " + source_line(pc) + ": " + name(*current) + (write ? " writes" : " reads") + " what " +
            (ordered(s.write) ? name(s.read) + " read" : name(s.write) + " wrote") + " without a meeting since");
    if (write)
      s.write = mine;
    else if (ordered(s.read))
      s.read = mine;
    else
      s.read.time = time, s.read.scope = std::max(Scope(s.read.scope), closest(s.read.thread, *current));
  }
};

Region* region_of(uintptr_t at, size_t bytes, const void* pc) {
  const auto holds = [&](const Region& r) { return at >= r.begin && at + bytes <= r.begin + r.bytes; };
  Region*& known = recent[uintptr_t(pc) / 4 % 1024];
  if (known && holds(*known)) return known;
  const auto after = regions.upper_bound(at);
  if (after == regions.begin() || !holds(std::prev(after)->second)) return nullptr;
  return known = &std::prev(after)->second;
}

void access(const void* place, size_t bytes, bool write, bool whole, const void* pc, uint64_t time = 0, bool atomic = false) {
  const uintptr_t at = uintptr_t(place);
  if (!current || at - uintptr_t(stacks) < kStacks) return;
  const char* const verb = write ? "write" : "read";
  if (whole && at % bytes)
    fail(text("misaligned %s of %zu bytes at %s: %s", verb, bytes, source_line(pc).c_str(), name(*current).c_str()));
  Region* const r = region_of(at, bytes, pc);
  if (!r) {
    const auto after = regions.upper_bound(at);
    std::string where;
    if (after != regions.begin()) {
      const Region& near = std::prev(after)->second;
      where = text(", %zu bytes into %zu", at - near.begin, near.bytes);
    }
    fail(text("%s of %zu bytes out of bounds at %s: %s", verb, bytes, source_line(pc).c_str(), name(*current).c_str()) + where);
  }
  if (!emulated_device.watched && !emulated_device.counted) return;
  const Access mine = {*r, write, atomic, time ? time : now, pc};
  Shadow* const shadows = r->shadows_of(at, bytes);
  size_t unique = 0;
  for (size_t i = 0; i < bytes / r->grain; ++i) {
    unique += (write ? shadows[i].write : shadows[i].read).time < launch_began ? r->grain : 0;
    mine.touch(shadows[i]);
  }
  if (!emulated_device.counted) return;
  Warp& warp = *current->warp;
  Request& request = warp.requests[{pc, warp.turn[current->lane][pc]++}];
  request.shared = r->shared, request.write = write, request.unique += unique;
  size_t& part = request.parts[at];
  part = std::max(part, bytes);
}

void count(Warp& warp) {
  for (const auto& [key, request] : warp.requests) {
    Traffic& t = traffic[{launches, key.first}];
    std::map<uintptr_t, int> units;  // sectors, or the words of each bank
    size_t distinct = 0;
    for (const auto& [at, bytes] : request.parts) {
      distinct += bytes;
      if (request.shared)
        for (uintptr_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) units[word % 32] += at % 4 == 0;
      else
        for (uintptr_t sector = at / 32; sector <= (at + bytes - 1) / 32; ++sector) units[sector] = 1;
    }
    int turns = 1;
    for (const auto& [bank, words] : units) turns = std::max(turns, words);
    t.kernel = launch_now.kernel, t.shared = request.shared, t.write = request.write;
    ++t.requests, t.asked += distinct, t.unique += request.unique;
    t.units += request.shared ? turns : units.size();
    t.least += request.shared ? (distinct + 127) / 128 : (distinct + 31) / 32;
  }
  warp = {};
}

// ---------------------------------------------------------------------------------------------------------------- schedule
void live() {
  for (;;) {
    call_now(closure_now);
    if (!current->copies.empty()) fail("copies are not waited for: " + name(*current));
    current->waits = kGrid;
    leave();
  }
}

void resume(Fibre& f) {
  current = &f;
  if (!_setjmp(scheduler)) {
    if (f.begun) _longjmp(f.state, 1);
    f.begun = true;
    const size_t index = f.rank * kMostThreads + f.id % sizes[kBlock];
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + index * kStack;
    context.uc_stack.ss_size = kStack - index % 64 * 64;  // not all on the same lines of the cache
    makecontext(&context, live, 0);
    setcontext(&context);
  }
  current = nullptr;
}

std::vector<int> arranged(int count) {
  std::vector<int> places(count);
  std::iota(places.begin(), places.end(), 0);
  if (emulated_device.order == 1) std::reverse(places.begin(), places.end());
  if (emulated_device.order > 1) std::shuffle(places.begin(), places.end(), random_number);
  return places;
}

bool together(const Fibre& f, const Fibre& g) {
  return f.waits == g.waits && f.mask == g.mask && f.line == g.line && f.file == g.file;
}

// Lets those go on that wait for a scope's meeting and whose company is complete; whether there were any.
bool meet_all(Scope scope, int first) {
  const int size = sizes[scope];
  bool met = false;
  for (int i = 0; i < size; ++i) {
    const Fibre& f = fibres[first + i];
    if (f.waits != scope) continue;
    const unsigned mask = f.mask;
    const auto belongs = [&](int j) { return scope != kWarp || mask >> j & 1; };
    bool complete = true;
    for (int j = 0; j < size && complete; ++j) complete = !belongs(j) || together(f, fibres[first + j]);
    if (!complete && scope != kWarp) return false;
    if (!complete) continue;
    met = true;
    unsigned ballot = 0;
    for (int j = 0; scope == kWarp && j < size; ++j) ballot |= unsigned(belongs(j) && fibres[first + j].value) << j;
    const bool orders = scope != kWarp || f.source == kBarrier;
    now += orders;
    uint64_t values[kLanes];
    for (int j = 0; scope == kWarp && j < size; ++j) values[j] = fibres[first + j].value;
    for (int j = 0; j < size; ++j) {
      Fibre& g = fibres[first + j];
      if (!belongs(j)) continue;
      if (orders) std::fill(g.since + kWarp, g.since + scope + 1, now);
      if (scope == kWarp && g.source >= 0 && !belongs(g.source))
        fail(text("shuffle from lane %d outside of %08x at %s:%d", g.source, mask, g.file, g.line));
      if (scope == kWarp) g.value = g.source >= 0 ? values[g.source] : ballot;
      g.waits = kThread;
    }
  }
  return met;
}

void run_warp(int first) {
  do {
    for (int lane : arranged(kLanes))
      if (fibres[first + lane].waits == kThread && fault_now.empty()) resume(fibres[first + lane]);
    if (emulated_device.counted) count(*fibres[first].warp);
  } while (fault_now.empty() && meet_all(kWarp, first));
}

void run_cluster(uint64_t index) {
  const int threads = sizes[kCluster], block = sizes[kBlock];
  const dim3 grid = launch_now.grid;
  std::vector<Warp> warps(threads / kLanes);
  cluster_began = ++now;
  for (auto& of_block : variables)
    for (auto& [key, bytes, data] : of_block) memset(data, emulated_device.poison, bytes);
  for (int i = 0; i < threads; ++i) {
    Fibre& f = fibres[i];
    const unsigned b = index * launch_now.cluster.x + i / block, t = i % block;
    f.block = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    f.thread = {t % launch_now.block.x, t / launch_now.block.x % launch_now.block.y, t / launch_now.block.x / launch_now.block.y};
    f.lane = i % kLanes, f.rank = i / block, f.id = index * threads + i, f.warp = &warps[i / kLanes];
    for (int scope = kThread; scope < kGrid; ++scope) f.first[scope] = f.id / sizes[scope] * sizes[scope];
    f.waits = kThread, f.copies.clear(), f.group = 0;
    std::fill(f.since, f.since + kGrid, now);
    f.since[kThread] = kNever;
  }
  for (bool met = true, ended = false; !ended && fault_now.empty();) {
    if (!met) {
      const auto other = std::find_if(fibres.begin(), fibres.end(), [](const Fibre& f) { return !together(f, fibres[0]); });
      fail("threads part: " + state(fibres[0]) + ", " + state(other == fibres.end() ? fibres[0] : *other));
      return;
    }
    for (int w : arranged(threads / kLanes)) run_warp(w * kLanes);
    met = false;
    for (int b = 0; b < threads; b += block) met |= meet_all(kBlock, b);
    met |= meet_all(kCluster, 0);
    ended = std::all_of(fibres.begin(), fibres.begin() + threads, [](const Fibre& f) { return f.waits == kGrid; });
  }
}

char* variable(int rank, const void* key, size_t bytes) {
  for (auto& [known, size, data] : variables[rank])
    if (known == key) return data;
  char* const data = static_cast<char*>(std::aligned_alloc(128, (bytes + 255) / 128 * 128));  // apart, and each from bank 0
  memset(data, emulated_device.poison, bytes);
  variables[rank].emplace_back(key, bytes, data);
  regions[uintptr_t(data)] = {uintptr_t(data), bytes, true};
  return data;
}

size_t static_bytes() {
  size_t sum = 0;
  for (auto& [key, bytes, data] : variables[0]) sum += key ? bytes : 0;
  return sum;
}

void forget_variables() {
  for (auto& of_block : variables) {
    for (auto& [key, bytes, data] : of_block) regions.erase(uintptr_t(data)), std::free(data);
    of_block.clear();
  }
  std::fill(std::begin(recent), std::end(recent), nullptr);
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what kernels and hosts call
namespace emulated {

uint3 threadIdx() { return current->thread; }
uint3 blockIdx() { return current->block; }
uint3 blockDim() { return {launch_now.block.x, launch_now.block.y, launch_now.block.z}; }
uint3 gridDim() { return {launch_now.grid.x, launch_now.grid.y, launch_now.grid.z}; }
unsigned block_rank() { return current->rank; }
unsigned cluster_blocks() { return launch_now.cluster.x; }

void* shared(const void* key, size_t bytes) { return variable(current->rank, key, key ? bytes : launch_now.shared_bytes); }
void* shared_of(const void* mine, int rank) {
  for (auto& [key, bytes, data] : variables[current->rank]) {
    const size_t offset = static_cast<const char*>(mine) - data;
    if (offset < bytes && unsigned(rank) < launch_now.cluster.x) return variable(rank, key, bytes) + offset;
  }
  fail(text("no shared memory of block %d of a cluster: ", rank) + name(*current));
  return nullptr;
}

void meet(Scope scope, const char* file, int line) {
  current->waits = scope, current->mask = ~0u, current->file = file, current->line = line;
  leave();
}
uint64_t exchange(unsigned mask, uint64_t value, int source, const char* file, int line) {
  Fibre& f = *current;
  f.waits = kWarp, f.mask = mask, f.value = value, f.source = source, f.file = file, f.line = line;
  leave();
  return f.value;
}

void copy_async(void* to, const void* from, size_t bytes) {
  const void* const pc = __builtin_return_address(0);
  access(from, bytes, false, true, pc);
  access(to, bytes, true, true, static_cast<const char*>(pc) + 1, kNever);  // until it is waited for, no one's access is after it
  current->copies.push_back({to, from, bytes, current->group});
}
void commit_copies() { ++current->group; }
void wait_for_copies(int but_last_groups) {
  auto& copies = current->copies;
  const auto left = std::stable_partition(copies.begin(), copies.end(), [&](const Copy& c) {
    return c.group < current->group - but_last_groups;
  });
  for (auto copy = copies.begin(); copy < left; ++copy) {
    memcpy(copy->to, copy->from, copy->bytes);
    Region* const r = region_of(uintptr_t(copy->to), copy->bytes, nullptr);
    Shadow* const shadows = r->shadows_of(uintptr_t(copy->to), copy->bytes);
    for (size_t i = 0; i < copy->bytes / r->grain; ++i) shadows[i].write = {now, current->id, kThread, false};
  }
  copies.erase(copies.begin(), left);
}
void atomic(const void* place, size_t bytes, const void* pc) {
  access(place, bytes, false, true, pc, 0, true);
  access(place, bytes, true, true, static_cast<const char*>(pc) + 1, 0, true);
}

cudaError_t run(const Launch& launch, void (*call)(const void*), const void* closure) {
  const std::lock_guard<std::mutex> guard(one_at_a_time);  // autograd launches from threads of its own
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  const int limit = dynamic_limits.count(launch.kernel) ? dynamic_limits[launch.kernel] : 48 << 10;
  fault_now.clear();
  if (!blocks || !threads || threads > kMostThreads || threads % kLanes || grid.y > 65535 || grid.z > 65535)
    fail(text("a grid of (%u, %u, %u) blocks of %lu threads", grid.x, grid.y, grid.z, threads));
  if (cluster.x > 1 && (emulated_device.generation < 9 || cluster.x > kMostBlocks || grid.x % cluster.x))
    fail(text("clusters of %u blocks in a grid of %u", cluster.x, grid.x));
  if (int64_t(launch.shared_bytes) > limit) fail(text("%zu bytes of shared memory, allowed are %d", launch.shared_bytes, limit));
  if (!fault_now.empty()) return last_error = cudaErrorInvalidConfiguration;

  launch_now = launch, call_now = call, closure_now = closure;
  sizes[kThread] = 1, sizes[kWarp] = kLanes, sizes[kBlock] = threads, sizes[kCluster] = threads * cluster.x;
  launch_began = ++now, ++launches;
  random_number.seed(emulated_device.order);
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kStacks, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  if (fibres.size() != sizes[kCluster]) fibres.clear(), fibres.resize(sizes[kCluster]);
  for (int index : arranged(blocks / cluster.x))
    if (fault_now.empty()) run_cluster(index);
  if (static_bytes() + launch.shared_bytes > size_t(emulated_device.shared_bytes)) fail("more shared memory than a block can have");
  forget_variables();
  if (!fault_now.empty()) fibres.clear();  // some are in the middle of a kernel
  return last_error = fault_now.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* fault() { return fault_now.c_str(); }
int attribute(int which) {
  return which == cudaDevAttrMultiProcessorCount      ? emulated_device.processors
         : which == cudaDevAttrComputeCapabilityMajor ? emulated_device.generation
                                                      : emulated_device.shared_bytes;
}
int resident(const void*, int threads, size_t shared_bytes) {
  return std::min<int>({emulated_device.per_processor, 2048 / threads, int((emulated_device.shared_bytes + 1024) / (shared_bytes + 1024))});
}
cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > emulated_device.shared_bytes) return last_error = cudaErrorInvalidValue;
  dynamic_limits[kernel] = bytes;
  return cudaSuccess;
}

// For device.cpp.
void* allocated(size_t bytes) {
  void* const data = std::aligned_alloc(512, (bytes + 1023) / 512 * 512);  // at least 512 bytes apart from the next
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  if (data) regions[uintptr_t(data)] = {uintptr_t(data), bytes, false};
  return data;
}
void released(void* data) {
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  regions.erase(uintptr_t(data));
  std::fill(std::begin(recent), std::end(recent), nullptr);
  std::free(data);
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

// ------------------------------------------------------------------------------------------------------ for emulated_cuda.py
extern "C" {
const char* emulated_fault() { return fault(); }

// A line for each launch and place in the program, tab-separated, since the last call.
const char* emulated_traffic() {
  static std::string lines;
  lines.clear();
  for (const auto& [key, t] : traffic)
    lines += text("%d\t%lx\t%lx\t%d\t%d\t%zu\t%zu\t%zu\t%zu\t%zu\n", key.first, in_library(t.kernel), in_library(key.second), t.shared,
                  t.write, t.requests, t.asked, t.unique, t.units, t.least);
  traffic.clear();
  return lines.c_str();
}

// What -fsanitize=thread calls.
#define EMULATED_ACCESSES(bytes)                                                                                  \
  void __tsan_read##bytes(void* at) { access(at, bytes, false, true, __builtin_return_address(0)); }              \
  void __tsan_write##bytes(void* at) { access(at, bytes, true, true, __builtin_return_address(0)); }              \
  void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, false, false, __builtin_return_address(0)); }   \
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
