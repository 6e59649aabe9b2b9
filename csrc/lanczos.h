#pragma once

#include "gram_product.h"

namespace samerge {

// What follows the product in a step of block Lanczos: z = q A is split into what lies in the known vectors, the last
// of which are q, and orthonormal vectors that leave them: z = inside known + leaving q'. These are known from then on.
struct Lanczos {
  void* basis;           // [B, capacity, stride] Real, zeros behind `side`; `known` vectors of each are there
  void* q;               // [B, width, side] Real: q' once more
  double* projected;     // [B, size, size]: the rows of q become inside [width, known]
  double* leaving;       // [B, width, width]
  const void* partials;  // [B, chunks, width, side] Real: z, as gram_product leaves it
  int64_t capacity, stride, size;
  int64_t known, width, side, chunks;
  bool wide;  // Real is double, else float
};

constexpr int64_t kBasisLanes = 16;  // a basis vector's stride is a multiple of it

}  // namespace samerge
