// How a team reads one row of logits, straight from memory or once into shared memory and from there, and writes its gradient.
#pragma once

#include <cuda_pipeline.h>

#include "softmax_kl_team.cuh"

namespace samerge::gpu {

// A row's share in one block, or in one warp: `chunks` times kCount numbers per thread, the first at column `begin`.
struct Share {
  int begin, chunks, columns, classes;
  bool aligned;  // packs lie on 16 bytes and in whole; else a thread's numbers are a team's width apart, to coalesce
};

template <class Team, int kCount>
struct Place {
  int first, step;

  __device__ Place(const Share& share, int chunk) {
    const int begin = share.begin + chunk * Team::kThreads * kCount, rank = Team::rank();
    first = share.aligned ? begin + rank * kCount : begin + rank;
    step = share.aligned ? 1 : Team::kThreads;
  }
  __device__ int operator[](int k) const { return first + k * step; }
  __device__ bool all_below(int end) const { return (*this)[kCount - 1] < end; }
};

// One row of student or teacher.
template <class Team, class Stored, int kCount>
struct Row {
  using Real = real_t<Stored>;
  const Stored* numbers;
  Pack<Stored, kCount>* kept;  // [chunks, threads]
  bool keep;                   // else the second pass reads again
  DType dtype;

  __device__ Pack<Stored, kCount> load(const Share& share, int chunk) const {
    const Place<Team, kCount> at(share, chunk);
    Pack<Stored, kCount> pack = {};
    if (share.aligned) {
      if (at.first < share.classes) pack = load_pack<Stored, kCount>(numbers, at.first);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (at[k] < share.classes) pack.numbers[k] = numbers[at[k]];
    }
    return pack;
  }

  // Starts to bring the share into shared memory. A thread reads back only what it has brought itself.
  __device__ void fetch(const Share& share) const {
    if (!keep) return;
    for (int chunk = 0; chunk < share.chunks; ++chunk) {
      auto* target = kept + chunk * Team::kThreads + Team::rank();
      const Place<Team, kCount> at(share, chunk);
      if (!share.aligned)
        *target = load(share, chunk);
      else if (at.first < share.classes)
        __pipeline_memcpy_async(target, numbers + at.first, sizeof(*target));
    }
  }

  __device__ Pack<Stored, kCount> read(const Share& share, int chunk) const {
    return keep ? kept[chunk * Team::kThreads + Team::rank()] : load(share, chunk);
  }

  // The numbers of a pack, -inf beyond the row's classes.
  __device__ void widen(const Share& share, int chunk, const Pack<Stored, kCount>& pack, Real* x) const {
    gpu::widen(pack, dtype, x);
    const Place<Team, kCount> at(share, chunk);
    if (at.all_below(share.classes)) return;
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = at[k] < share.classes ? x[k] : -INFINITY;
  }

  __device__ Real at(int column) const {
    Pack<Stored, 1> one;
    one.numbers[0] = numbers[column];
    Real x;
    gpu::widen(one, dtype, &x);
    return x;
  }

  // Calls use(chunk, x) with all numbers.
  template <class Use>
  __device__ void first_pass(const Share& share, const Use& use) const {
#pragma unroll 2
    for (int chunk = 0; chunk < share.chunks; ++chunk) {
      Real x[kCount];
      widen(share, chunk, read(share, chunk), x);
      use(chunk, x);
    }
  }
};

// The gradient of a row, or what lies of it in this block, from the slopes by x / temperature.
template <class Team, class Student, int kCount>
struct Gradient {
  using Real = real_t<Student>;
  Student* numbers;  // [V]
  Real scale;
  DType dtype;
  bool aligned;

  __device__ __forceinline__ void write(const Share& share, int chunk, Real* slope) const {
    const Place<Team, kCount> at(share, chunk);
#pragma unroll
    for (int k = 0; k < kCount; ++k) slope[k] *= scale;
    if (!at.all_below(share.classes)) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) slope[k] = at[k] < share.classes ? slope[k] : Real(0);
    }
    const auto pack = narrow<Student, kCount>(slope, dtype);
    if (aligned) {
      if (at.first < share.columns) store_pack(numbers, at.first, pack);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        if (at[k] < share.columns) numbers[at[k]] = pack.numbers[k];
    }
  }
};

}  // namespace samerge::gpu
