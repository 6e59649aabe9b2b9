#include "levels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace samerge {
namespace {

struct Level {
  const char* name;
  const Loops* loops;
  bool runs;
};

// Best first.
const Level* levels_begin() {
#ifdef SAMERGE_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const Level levels[] = {{"avx512", &avx512_loops, avx512},
                                 {"avx2", &avx2_loops, avx2},
                                 {"portable", &portable_loops, true},
                                 {nullptr, nullptr, false}};
#else
  static const Level levels[] = {{"portable", &portable_loops, true}, {nullptr, nullptr, false}};
#endif
  return levels;
}

const Level* find(const char* name) {
  std::string names;
  for (const Level* level = levels_begin(); level->name; ++level) {
    if (!level->runs) continue;
    if (!std::strcmp(name, level->name) || !std::strcmp(name, "auto")) return level;
    names += std::string(", ") + level->name;
  }
  throw std::invalid_argument("CPU level '" + std::string(name) +
                              "' is unknown or does not run on this machine; choose auto" + names +
                              " (SAMERGE_CPU_LEVEL, set_cpu_level)");
}

const Level*& active() {
  static const Level* level = find(std::getenv("SAMERGE_CPU_LEVEL") ? std::getenv("SAMERGE_CPU_LEVEL") : "auto");
  return level;
}

}  // namespace

const Loops& loops() { return *active()->loops; }

const char* cpu_level() { return active()->name; }

void set_cpu_level(const char* name) { active() = find(name); }

}  // namespace samerge
