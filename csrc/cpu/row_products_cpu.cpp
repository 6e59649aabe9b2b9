#include <ATen/Parallel.h>

#include <memory>

#include "../tensors.h"
#include "levels.h"
#include "parallel.h"
#include "scratch.h"

namespace samerge {
namespace {

constexpr int64_t kLeastProducts = 1 << 17;  // fewer do not pay for a thread

RowProducts row_products_call(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix) {
  const auto real = accumulator(matrix);
  for (const at::Tensor* tensor : {&out, &rows, &matrix})
    TORCH_CHECK_VALUE(
        tensor->dim() == 2 && tensor->device().is_cpu() && (tensor->size(1) <= 1 || tensor->stride(1) == 1),
        "rows, the matrix and out must be matrices with dense rows, on the CPU");
  TORCH_CHECK_TYPE(out.scalar_type() == real && rows.scalar_type() == real, "rows and out must be ", real,
                   ", as sums of a matrix of ", matrix.scalar_type(), " are");
  RowProducts a{};
  a.out = out.mutable_data_ptr();
  a.rows = rows.const_data_ptr();
  a.matrix = matrix.const_data_ptr();
  a.num_rows = rows.size(0);
  a.height = matrix.size(0);
  a.width = matrix.size(1);
  a.out_stride = out.stride(0);
  a.row_stride = rows.stride(0);
  a.matrix_stride = matrix.stride(0);
  a.matrix_dtype = dtype_of(matrix);
  return a;
}

// [R, H] -> [H, padded], the rest zeros.
template <class Real>
void transpose(const RowProducts& a, Real* target) {
  const Real* rows = static_cast<const Real*>(a.rows);
  for (int64_t k = 0; k < a.width; ++k)
    for (int64_t r = 0; r < a.padded; ++r)
      target[k * a.padded + r] = r < a.num_rows ? rows[r * a.row_stride + k] : Real(0);
}

int64_t least(int64_t products_of_one) { return 1 + kLeastProducts / (products_of_one + 1); }

}  // namespace

// out [R, V] = rows [R, H] · matrix [V, H]ᵀ
void rows_times_transposed_cpu(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix) {
  RowProducts a = row_products_call(out, rows, matrix);
  TORCH_CHECK_VALUE(rows.size(1) == a.width && out.size(0) == a.num_rows && out.size(1) == a.height,
                    "out must be [R, V], with rows [R, H] and a matrix [V, H]");
  if (out.numel() == 0) return;
  a.padded = (a.num_rows + kRowPadding - 1) / kRowPadding * kRowPadding;
  const Scratch turned(a.width * a.padded * rows.itemsize());
  if (a.matrix_dtype == DType::f64)
    transpose(a, static_cast<double*>(turned.data()));
  else
    transpose(a, static_cast<float*>(turned.data()));
  a.rows = turned.data();
  const auto loop = loops().rows_times_transposed;
  const int64_t bytes = loop(a, 0, 0, nullptr), slabs = (a.height + kSlabRows - 1) / kSlabRows;
  share_out(slabs, least(kSlabRows * a.width * a.num_rows), 4,
            [&](int64_t first, int64_t last) { loop(a, first, last, Scratch(bytes).data()); });
}

// out [R, H] += rows [R, V] · matrix [V, H]
void add_rows_times_cpu(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix) {
  const RowProducts a = row_products_call(out, rows, matrix);
  TORCH_CHECK_VALUE(rows.size(1) == a.height && out.size(0) == a.num_rows && out.size(1) == a.width,
                    "out must be [R, H], with rows [R, V] and a matrix [V, H]");
  if (out.numel() == 0) return;
  const auto loop = loops().add_rows_times;
  const int64_t bytes = loop(a, 0, 0, nullptr), units = (a.width + kUnitColumns - 1) / kUnitColumns;
  at::parallel_for(0, units, least(kUnitColumns * a.height * a.num_rows),
                   [&](int64_t first, int64_t last) { loop(a, first, last, Scratch(bytes).data()); });
}

}  // namespace samerge
