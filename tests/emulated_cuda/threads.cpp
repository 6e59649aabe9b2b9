// The threads of the emulated device. Every thread of a cluster is a fibre, and clusters run one after another; a fibre runs until
// it must meet others, and goes on when all of them are there.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "runtime.h"

namespace emulated {

Device emulated_device;
__thread Fibre* current;
const char* stacks;
Launch launch_now;
uint64_t sizes[kGrid], now, launch_began, cluster_began;
std::recursive_mutex one_at_a_time;

namespace {

struct Variable {
  const void* key;
  size_t bytes;
  char* data;
};
std::vector<Variable> variables[kMostBlocks];  // __shared__, of each block of a cluster
std::vector<Fibre> fibres;                     // of a cluster, by block and thread
jmp_buf scheduler;
void (*call_now)(const void*);
const void* closure_now;
std::string fault_now;
cudaError_t last_error;
std::map<const void*, int> shared_limits;  // of kernels
std::minstd_rand random_number;

// ------------------------------------------------------------------------------------------------------------------ fibres
void leave() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

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
    const size_t index = &f - fibres.data();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = const_cast<char*>(stacks) + index * kStack;
    context.uc_stack.ss_size = kStack - index % 64 * 64;  // not all on the same lines of the cache
    makecontext(&context, live, 0);
    setcontext(&context);
  }
  current = nullptr;
}

// ---------------------------------------------------------------------------------------------------------------- meetings
bool together(const Fibre& f, const Fibre& g) {
  return f.waits == g.waits && f.mask == g.mask && f.line == g.line && f.file == g.file;
}

// Gives every lane of the mask what it asked for.
void exchange_values(unsigned mask, Fibre* lanes) {
  uint64_t values[kLanes], ballot = 0;
  for (int i = 0; i < kLanes; ++i) values[i] = lanes[i].value, ballot |= uint64_t(mask >> i & 1 && values[i]) << i;
  for (int i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const int source = lanes[i].source;
    if (source >= 0 && !(mask >> source & 1))
      fail(text("shuffle from lane %d outside of %08x at %s:%d", source, mask, lanes[i].file, lanes[i].line));
    lanes[i].value = source >= 0 ? values[source] : ballot;
  }
}

// Lets those go on that wait for a meeting of this scope, which begins at a fibre, and are complete. Whether there were any.
bool meet_all(Scope scope, Fibre* begin) {
  Fibre* const end = begin + sizes[scope];
  bool met = false;
  for (Fibre* f = begin; f < end; ++f) {
    if (f->waits != scope) continue;
    const unsigned mask = f->mask;
    const auto invited = [&](const Fibre& g) { return scope != kWarp || mask >> g.lane() & 1; };
    const bool complete = std::all_of(begin, end, [&](const Fibre& g) { return !invited(g) || together(*f, g); });
    if (!complete && scope != kWarp) return false;
    if (!complete) continue;
    met = true;
    const bool orders = scope != kWarp || f->source == kBarrier;  // a shuffle orders nothing else
    now += orders;
    if (scope == kWarp) exchange_values(mask, begin);
    for (Fibre* g = begin; g < end; ++g) {
      if (!invited(*g)) continue;
      if (orders) std::fill(g->since + kWarp, g->since + scope + 1, now);
      g->waits = kThread;
    }
  }
  return met;
}

std::string state(const Fibre& f) {
  static const char* const kStates[] = {"runs", "meets its warp", "meets its block", "meets its cluster", "has ended"};
  const std::string place = f.waits == kThread || f.waits == kGrid ? "" : text(" at %s:%d", f.file, f.line);
  return name(f) + " " + kStates[f.waits] + place + (f.waits == kWarp ? text(" with %08x", f.mask) : "");
}

// ---------------------------------------------------------------------------------------------------------------- schedule
std::vector<int> arranged(int count) {
  std::vector<int> places(count);
  std::iota(places.begin(), places.end(), 0);
  if (emulated_device.order == 1) std::reverse(places.begin(), places.end());
  if (emulated_device.order > 1) std::shuffle(places.begin(), places.end(), random_number);
  return places;
}

void run_warp(Fibre* lanes) {
  do {
    for (int lane : arranged(kLanes))
      if (lanes[lane].waits == kThread && fault_now.empty()) resume(lanes[lane]);
    count();
  } while (fault_now.empty() && meet_all(kWarp, lanes));
}

void begin(uint64_t cluster) {
  const dim3 grid = launch_now.grid, block = launch_now.block;
  cluster_began = ++now;
  for (auto& of_block : variables)
    for (auto& variable : of_block) memset(variable.data, emulated_device.poison, variable.bytes);
  for (size_t i = 0; i < fibres.size(); ++i) {
    Fibre& f = fibres[i];
    f.rank = i / sizes[kBlock], f.id = cluster * sizes[kCluster] + i;
    const unsigned b = f.id / sizes[kBlock], t = f.id % sizes[kBlock];
    f.block = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    f.thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    for (int scope = kThread; scope < kGrid; ++scope)
      f.first[scope] = f.id / sizes[scope] * sizes[scope], f.since[scope] = now;
    f.since[kThread] = kNever;
    f.waits = kThread, f.copies.clear(), f.group = 0;
  }
}

void run(uint64_t cluster) {
  begin(cluster);
  const auto has_ended = [](const Fibre& f) { return f.waits == kGrid; };
  while (fault_now.empty()) {
    for (int warp : arranged(fibres.size() / kLanes)) run_warp(&fibres[warp * kLanes]);
    if (std::all_of(fibres.begin(), fibres.end(), has_ended)) return;
    bool met = false;
    for (size_t first = 0; first < fibres.size(); first += sizes[kBlock]) met |= meet_all(kBlock, &fibres[first]);
    if (met | meet_all(kCluster, &fibres[0])) continue;
    const auto apart = [](const Fibre& f) { return !together(f, fibres[0]); };
    const auto other = std::find_if(fibres.begin(), fibres.end(), apart);
    fail("threads part: " + state(fibres[0]) + ", " + state(other == fibres.end() ? fibres[0] : *other));
  }
}

char* variable(int rank, const void* key, size_t bytes) {
  for (const Variable& known : variables[rank])
    if (known.key == key) return known.data;
  char* const data = static_cast<char*>(allocated(bytes, true));
  memset(data, emulated_device.poison, bytes);
  variables[rank].push_back({key, bytes, data});
  return data;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- what kernels call
uint3 threadIdx() { return current->thread; }
uint3 blockIdx() { return current->block; }
uint3 blockDim() { return {launch_now.block.x, launch_now.block.y, launch_now.block.z}; }
uint3 gridDim() { return {launch_now.grid.x, launch_now.grid.y, launch_now.grid.z}; }
unsigned block_rank() { return current->rank; }
unsigned cluster_blocks() { return launch_now.cluster.x; }

void* shared(const void* key, size_t bytes) {
  return variable(current->rank, key, key ? bytes : launch_now.shared_bytes);
}
void* shared_of(const void* mine, int rank) {
  for (const auto& [key, bytes, data] : variables[current->rank]) {
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
  current->value = value, current->source = source;
  current->waits = kWarp, current->mask = mask, current->file = file, current->line = line;
  leave();
  return current->value;
}

// --------------------------------------------------------------------------------------------------------- what hosts call
cudaError_t run(const Launch& launch, void (*call)(const void*), const void* closure) {
  const std::lock_guard<std::recursive_mutex> guard(one_at_a_time);
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = block.x * block.y * block.z,
                 cluster = launch.cluster.x;
  const size_t allowed = shared_limits.count(launch.kernel) ? shared_limits[launch.kernel] : 48 << 10;
  fault_now.clear();
  if (!blocks || !threads || threads > kMostThreads || threads % kLanes || grid.y > 65535 || grid.z > 65535)
    fail(text("a grid of (%u, %u, %u) blocks of %lu threads", grid.x, grid.y, grid.z, threads));
  if (cluster > 1 && (emulated_device.generation < 9 || cluster > kMostBlocks || grid.x % cluster))
    fail(text("clusters of %lu blocks in a grid of %u", cluster, grid.x));
  if (launch.shared_bytes > allowed)
    fail(text("%zu bytes of shared memory, allowed are %zu", launch.shared_bytes, allowed));
  if (!fault_now.empty()) return last_error = cudaErrorInvalidConfiguration;

  launch_now = launch, call_now = call, closure_now = closure;
  sizes[kThread] = 1, sizes[kWarp] = kLanes, sizes[kBlock] = threads, sizes[kCluster] = threads * cluster;
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, kStacks, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  fibres.resize(sizes[kCluster]);
  launch_began = ++now;
  random_number.seed(emulated_device.order);
  for (int index : arranged(blocks / cluster))
    if (fault_now.empty()) run(index);
  if (!fault_now.empty()) fibres.clear();  // some are in the middle of a kernel
  size_t shared_bytes = launch.shared_bytes;
  for (const Variable& one : variables[0]) shared_bytes += one.key ? one.bytes : 0;
  if (shared_bytes > size_t(emulated_device.shared_bytes))
    fail(text("%zu bytes of shared memory for a block", shared_bytes));
  for (auto& of_block : variables)
    for (const Variable& one : std::exchange(of_block, {})) released(one.data);
  return last_error = fault_now.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* fault() { return fault_now.c_str(); }
int attribute(int which) {
  return which == cudaDevAttrMultiProcessorCount      ? emulated_device.processors
         : which == cudaDevAttrComputeCapabilityMajor ? emulated_device.generation
                                                      : emulated_device.shared_bytes;
}
int resident(int threads, size_t shared_bytes) {
  const size_t by_shared = (emulated_device.shared_bytes + 1024) / (shared_bytes + 1024);
  return std::min<size_t>({size_t(emulated_device.per_processor), size_t(2048 / threads), by_shared});
}
cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > emulated_device.shared_bytes) return last_error = cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------------------------- what both call
std::string text(const char* pattern, ...) {
  char line[1000];
  va_list list;
  va_start(list, pattern);
  vsnprintf(line, sizeof line, pattern, list);
  va_end(list);
  return line;
}
std::string name(const Fibre& f) {
  return text("block (%u, %u, %u) thread %u", f.block.x, f.block.y, f.block.z, f.thread.x);
}
void fail(const std::string& what) {
  if (fault_now.empty()) fault_now = what;
  if (current) leave();
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
extern "C" const char* emulated_fault() { return emulated::fault(); }
