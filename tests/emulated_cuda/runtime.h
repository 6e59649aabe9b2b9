// What the two halves of the emulated device share: threads.cpp runs a kernel's threads, memory.cpp watches what they touch.
#pragma once

#include <setjmp.h>

#include <mutex>
#include <string>
#include <vector>

#include "language.h"

namespace emulated {

// What a test may choose; emulated_cuda.py has the same names.
struct Device {
  int processors = 4, per_processor = 2, generation = 9, shared_bytes = 232448;
  int order = 0;      // of threads, warps and clusters: 0 forward, 1 backward, else random with this seed
  int poison = 0xff;  // the bytes of shared memory before anything is written
  int watched = 1;    // whether races are looked for
  int counted = 0;    // whether traffic is kept
};
extern "C" Device emulated_device;

constexpr int kLanes = 32, kMostThreads = 1024, kMostBlocks = 8;  // of a block, of a cluster
constexpr size_t kStack = 64 << 10, kStacks = kStack * kMostThreads * kMostBlocks;
constexpr uint64_t kNever = 0xffffffff;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fibre {
  jmp_buf state;
  bool begun;
  uint3 thread, block;
  int rank;               // of the block in its cluster
  uint64_t id;            // in the launch
  uint64_t first[kGrid];  // the id of the first in each scope
  uint64_t since[kGrid];  // what others in a scope did before this time has happened
  Scope waits;            // for the meeting of a scope; kThread: it runs, kGrid: it has ended
  unsigned mask;          // of the lanes that it meets
  uint64_t value;         // that it brings, and takes away
  int source, line;
  const char* file;
  std::vector<Copy> copies;
  int group;  // of the next copy

  int lane() const { return id % kLanes; }
};

extern __thread Fibre* current;  // null while this thread of the host runs none of a kernel
extern const char* stacks;       // of all fibres
extern Launch launch_now;
extern uint64_t sizes[kGrid];  // how many threads a scope has
extern uint64_t now, launch_began, cluster_began;

std::string text(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string name(const Fibre& thread);
void fail(const std::string& what);  // ends the launch, of whose faults the first counts

extern std::recursive_mutex one_at_a_time;  // autograd launches from threads of its own
void* allocated(size_t bytes, bool shared = false);
void released(void* data);
void count();  // adds up what the lanes of a warp have asked for, of one warp at a time

}  // namespace emulated
