// Numbers ordered by magnitude as their bits are without the sign: counting their digits, and zeroing the small ones.
#pragma once

#include "../dtype.h"

namespace samerge::SAMERGE_LEVEL {

template <class Bits>
constexpr Bits kMagnitude = Bits(~Bits(0)) >> 1;  // all bits but the sign's

template <class Bits>
void count_digits_of(const Bits* numbers, int64_t count, int shift, int64_t prefix, int64_t* counts) {
  for (int64_t i = 0; prefix < 0 && i < count; ++i) ++counts[uint64_t(numbers[i] & kMagnitude<Bits>) >> shift];
  for (int64_t i = 0; prefix >= 0 && i < count; ++i) {
    const uint64_t key = uint64_t(numbers[i] & kMagnitude<Bits>) >> shift;
    if (int64_t(key >> 16) == prefix) ++counts[key & 0xffff];
  }
}

void count_digits(const void* numbers, int64_t count, int bytes, int shift, int64_t prefix, int64_t* counts) {
  if (bytes == 2) count_digits_of(static_cast<const uint16_t*>(numbers), count, shift, prefix, counts);
  if (bytes == 4) count_digits_of(static_cast<const uint32_t*>(numbers), count, shift, prefix, counts);
  if (bytes == 8) count_digits_of(static_cast<const uint64_t*>(numbers), count, shift, prefix, counts);
}

template <class Bits>
int64_t trim_of(Bits* out, const Bits* numbers, int64_t count, Bits key, int64_t ties) {
  for (int64_t first = 0; first < count; first += kBlock) {
    const Bits* block = numbers + first;
    Bits* trimmed = out + first;
    const int64_t n = count - first < kBlock ? count - first : kBlock;
    const auto magnitude = [&](int64_t i) { return Bits(block[i] & kMagnitude<Bits>); };
    Bits found = 0;
    for (int64_t i = 0; ties > 0 && i < n; ++i) found += magnitude(i) == key;
    if (ties > 0 && int64_t(found) > ties) {
      for (int64_t i = 0; i < n; ++i)
        trimmed[i] = magnitude(i) > key || (magnitude(i) == key && ties-- > 0) ? block[i] : Bits(0);
      ties = 0;
      continue;
    }
    const Bits smallest = ties == 0 ? key + 1 : key;
    if (ties > 0) ties -= found;
#pragma GCC ivdep  // out may be the numbers
    for (int64_t i = 0; i < n; ++i) trimmed[i] = magnitude(i) >= smallest ? block[i] : Bits(0);
  }
  return ties;
}

int64_t trim(void* out, const void* numbers, int64_t count, int bytes, uint64_t key, int64_t ties) {
  const auto of = [&](auto* bits, auto key) {
    return trim_of(bits, static_cast<const decltype(key)*>(numbers), count, key, ties);
  };
  if (bytes == 2) return of(static_cast<uint16_t*>(out), uint16_t(key));
  if (bytes == 4) return of(static_cast<uint32_t*>(out), uint32_t(key));
  return of(static_cast<uint64_t*>(out), key);
}

}  // namespace samerge::SAMERGE_LEVEL
