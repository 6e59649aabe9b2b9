#pragma once

#include "dtype.h"

namespace samerge {

constexpr int64_t kDigits = 1 << 16;

// Rows of numbers of 2, 4 or 8 bytes, ordered by magnitude, which is their bits without the sign's. Of the smallest magnitude that
// is kept in row t, keys[t] holds the digits of 16 bits that are known, from the highest on, and ties[t] how many of the numbers
// that have them are kept, the first ones. Where that is 0 or negative no digit is looked for any more; negative: all are kept.
struct Magnitudes {
  const void* numbers;  // [T, n], rows `stride` apart
  int64_t* keys;        // [T]
  int64_t* ties;        // [T]
  int64_t num_rows, count, stride;
  int bytes;  // of a number
};

}  // namespace samerge
