#pragma once

#include "dtype.h"

namespace samerge {

constexpr int64_t kStretch = 1 << 16;  // numbers of a row that share a key

// out[t, i] = uniform(i % kStretch, keys[t, i / kStretch]) < thresholds[t] ? factors[t] * numbers[t, i] : 0
struct Drop {
  void* out;                  // [T, n], rows out_stride apart
  const void* numbers;        // [T, n], rows stride apart
  const int32_t* keys;        // [T, n up to whole stretches / kStretch]
  const int64_t* thresholds;  // [T], 0 ... 2^31
  const void* factors;        // [T] float, double for f64
  int64_t num_rows, count, out_stride, stride;
  DType dtype;
};

// 0 ... 2^31 - 1: the place, spread by the golden ratio, and the key, mixed as MurmurHash3 ends (Appleby, 2011; fmix32).
SAMERGE_ANYWHERE uint32_t uniform(uint32_t place, uint32_t key) {
  uint32_t mixed = place * 0x9e3779b9u + key;
  mixed = (mixed ^ mixed >> 16) * 0x85ebca6bu;
  mixed = (mixed ^ mixed >> 13) * 0xc2b2ae35u;
  return (mixed ^ mixed >> 16) >> 1;
}

}  // namespace samerge
