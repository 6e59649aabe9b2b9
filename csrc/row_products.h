#pragma once

#include "dtype.h"

namespace samerge {

// R rows times a matrix W [V, H] too large for the caches: out = rows W^T, or out += rows W. W is read once, where it lies.
// Real is double where W is, else float.
struct RowProducts {
  void* out;           // [R, V] of rows W^T, [R, H] of rows W; Real
  const void* rows;    // of rows W^T transposed, [H, padded], zeros past R; of rows W [R, V]; Real
  const void* matrix;  // [V, H]
  int64_t num_rows, padded;
  int64_t height, width;                          // V, H
  int64_t out_stride, row_stride, matrix_stride;  // between rows, in numbers
  DType matrix_dtype;
};

// What padded is a multiple of, and how the work is shared out: rows W^T by slabs of W's rows, rows W by units of its columns.
// Every number is one sum whose order depends on V and H alone.
constexpr int64_t kRowPadding = 16, kSlabRows = 48, kUnitColumns = 16;

}  // namespace samerge
