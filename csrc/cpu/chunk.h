// Rows of numbers, a chunk at a time as whole vectors of the type that they are computed in. What is stored in that type is read
// and written where it lies; a last vector that is not full has a place of its own.
#pragma once

#include "levels.h"
#include "simd.h"

namespace samerge::SAMERGE_LEVEL {

constexpr int64_t kChunk = kSoftmaxKlChunk;

// n numbers at `values`, where those that do not fill a vector lie at their place in `buffer`.
template <class Vector, class Number = lane_t<Vector>>
struct Chunk {
  Number* values;
  Number* tail;
  int64_t whole;  // numbers at values

  SAMERGE_INLINE Chunk(Number* values, Number* buffer, int64_t n)
      : values(values), tail(buffer + n - n % kLanes<Vector>), whole(n - n % kLanes<Vector>) {}
  Number* at(int64_t i) const { return i < whole ? values + i : tail + (i - whole); }
  Number* vector(int64_t i, bool last) const { return last ? tail : values + i; }
};

template <class Vector>
using ConstChunk = Chunk<Vector, const lane_t<Vector>>;

// Calls body(i, last) for every vector of chunks of n numbers, where `last` says that it is not full and lies in the tails.
template <class Vector, class Body>
SAMERGE_INLINE void for_vectors(int64_t n, const Body& body) {
  const int64_t whole = n - n % kLanes<Vector>;
  for (int64_t i = 0; i < whole; i += kLanes<Vector>) body(i, false);
  if (whole < n) body(whole, true);
}

// The values of a chunk of n numbers to read, with -inf after them; in `buffer` those stored in another type.
template <class Storage, class Real = lane_t<typename Storage::Vector>>
const Real* read_chunk(const void* source, int64_t n, Real* buffer) {  // [n], [n up to whole vectors]
  using Vector = typename Storage::Vector;
  constexpr int kStep = kLanes<Vector>;
  const auto* numbers = static_cast<const typename Storage::Stored*>(source);
  const int rest = n % kStep;
  const int64_t whole = n - rest;
  if (whole && rest) {  // in registers: a load that spans two recent stores would wait for both
    store(buffer + whole, last_lanes(Storage::read(numbers + n - kStep), rest, -__builtin_inff()));
  } else if (rest) {
    typename Storage::Stored few[kStep] = {};
    for (int i = 0; i < rest; ++i) few[kStep - rest + i] = numbers[i];
    store(buffer, last_lanes(Storage::read(few), rest, -__builtin_inff()));
  }
  if constexpr (Storage::kWide) return numbers;
  for (int64_t i = 0; i < whole; i += kStep) store(buffer + i, Storage::read(numbers + i));
  return buffer;
}

// What is not yet where it is stored: numbers of another type, and the tail. ahead: from a number to the one whose place is
// fetched meanwhile.
template <class Storage, bool kStream, class Vector = typename Storage::Vector>
void write_chunk(const Chunk<Vector>& chunk, void* target, int64_t n, int64_t ahead) {
  auto* numbers = static_cast<typename Storage::Stored*>(target);
  if constexpr (!Storage::kWide)
    for (int64_t i = 0; i < chunk.whole; i += kLanes<Vector>) {
      const auto rounded = Storage::round(load<Vector>(chunk.values + i));
      if constexpr (kStream) {
        stream(numbers + i, rounded);
      } else {
        __builtin_prefetch(numbers + i + ahead, 1);
        store(numbers + i, rounded);
      }
    }
  if (n == chunk.whole) return;
  typename Storage::Stored few[kLanes<Vector>];
  store(few, Storage::round(load<Vector>(chunk.tail)));
  for (int64_t i = chunk.whole; i < n; ++i) numbers[i] = few[i - chunk.whole];
}

// What knows how numbers are stored.
template <class Vector, class Real = lane_t<Vector>>
struct RowFunctions {
  const Real* (*read)(const void*, int64_t, Real*);
  void (*write)(const Chunk<Vector>&, void*, int64_t, int64_t);
  void (*stream)(const Chunk<Vector>&, void*, int64_t, int64_t);
  bool wide;      // in the type that they are computed in
  int64_t bytes;  // of a number
};

template <class Storage>
constexpr RowFunctions<typename Storage::Vector> row_functions = {read_chunk<Storage>, write_chunk<Storage, false>,
                                                                  write_chunk<Storage, true>, Storage::kWide,
                                                                  int64_t(sizeof(typename Storage::Stored))};

}  // namespace samerge::SAMERGE_LEVEL
