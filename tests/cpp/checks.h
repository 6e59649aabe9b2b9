// What the tests of the CPU loops share. Buffers end where their numbers end, so that AddressSanitizer finds an access behind
// them, and are NaN at first, so that a comparison finds a number that was never written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/levels.h"

namespace samerge {

inline std::string at_work;  // what is being tested, for the message of a failure

[[noreturn]] inline void fail(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: %s does not hold: level %s, %s\n", file, line, condition, cpu_level(), at_work.c_str());
  std::exit(1);
}

#define CHECK(condition) ((condition) ? void() : fail(#condition, __FILE__, __LINE__))

struct TestedLevel {
  const char* name;
  int64_t calls;
};
inline std::vector<TestedLevel> tested_levels;  // those that run on this machine

template <class Call>
void on_every_level(const Call& call) {
  for (TestedLevel& level : tested_levels) {
    set_cpu_level(level.name);
    call();
    ++level.calls;
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline DType computed_in(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"f32", "bf16", "f16", "f64"};
  return names[int(dtype)];
}

inline double half_value(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double magnitude = exponent == 31  ? (fraction ? std::nan("") : std::numeric_limits<double>::infinity())
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}

inline uint16_t half_bits(double x) {  // rounded towards zero; |x| < 65536, or infinite, or NaN
  const uint16_t sign = std::signbit(x) << 15;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  const int exponent = std::max(std::ilogb(x == 0 ? 0x1p-14 : x), -14);
  const int digits = int(std::ldexp(std::fabs(x), 10 - exponent));  // with the leading one, which a subnormal lacks
  return sign | ((exponent + 14) * 1024 + digits);
}

// Numbers as they are stored, at an address that is a multiple of 64 and, behind `size`, not to be touched.
class Numbers {
 public:
  const DType dtype;
  const int64_t size;

  Numbers(DType dtype, int64_t size) : dtype(dtype), size(size), bytes_(allocate(size * bytes_of(dtype)), std::free) {
    poison();
  }

  void* data() { return bytes_.get(); }
  void poison() { std::memset(data(), 0xff, size * bytes_of(dtype)); }

  // Whether none of `count` numbers from `first` on was written since.
  bool poisoned(int64_t first, int64_t count) const {
    for (int64_t i = first * bytes_of(dtype); i < (first + count) * bytes_of(dtype); ++i)
      if (bytes_.get()[i] != 0xff) return false;
    return true;
  }

  double operator[](int64_t i) const {
    if (dtype == DType::f64) return read<double>(i);
    if (dtype == DType::f32) return read<float>(i);
    if (dtype == DType::f16) return half_value(read<uint16_t>(i));
    const uint32_t bits = uint32_t(read<uint16_t>(i)) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  void set(int64_t i, double x) {
    if (dtype == DType::f64) return write(i, x);
    if (dtype == DType::f32) return write(i, float(x));
    if (dtype == DType::f16) return write(i, half_bits(x));
    const float narrow = x;
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    write(i, uint16_t(bits >> 16));
  }

 private:
  std::unique_ptr<unsigned char, void (*)(void*)> bytes_;

  static unsigned char* allocate(int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) std::abort();
    return static_cast<unsigned char*>(memory);
  }
  template <class Stored>
  Stored read(int64_t i) const {
    Stored x;
    std::memcpy(&x, bytes_.get() + i * sizeof(x), sizeof(x));
    return x;
  }
  template <class Stored>
  void write(int64_t i, Stored x) {
    std::memcpy(bytes_.get() + i * sizeof(x), &x, sizeof(x));
  }
};

// Normal numbers, the same on every run: `count` from `first` on.
inline void fill(Numbers& numbers, int64_t first, int64_t count, double scale = 1) {
  static std::mt19937 generator;
  std::normal_distribution<double> normal(0, scale);
  for (int64_t i = first; i < first + count; ++i) numbers.set(i, normal(generator));
}

// Of the error's L2 norm, relative to that of the truth. f16, bf16: the rounding of results, at most 2^-11 or 2^-8 of each, which
// equal results all reach. f32: some 20 roundings of 2^-24, as sums are added lane by lane. f64: a lane's sum of 250 equal terms,
// where each addition errs to the same side.
inline double tolerance(DType dtype) {
  constexpr double of[] = {1.5e-6, 4e-3, 5e-4, 2e-14};
  return of[int(dtype)];
}

// `result` is a function of the position, stored in or computed in dtype. The error is relative to at_least where the truth is
// smaller: what remains of numbers that cancel has lost their digits. The truth itself is summed in double, which loses 1e-14.
template <class Result>
bool close(const std::vector<double>& truth, DType dtype, const Result& result, double at_least = 0) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double x = result(i);
    if (std::isinf(truth[i]) && x == truth[i]) continue;
    error += (x - truth[i]) * (x - truth[i]);
    norm += truth[i] * truth[i];
  }
  return std::sqrt(error) <= tolerance(dtype) * std::max(std::sqrt(norm), at_least) + 1e-14;  // false where NaN
}

void test_weighted_sum();
void test_coefficient_grad();
void test_softmax_kl();
void test_moments();
void test_gram_product();
void test_orthogonalise();
void test_row_products();

}  // namespace samerge
