#include "../elected_sum.h"

#include "../tensors.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

at::Tensor elected_sum_cpu(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                           double scale,
                           bool normalize) {  // [N], [T, N], [T]
  TORCH_CHECK_VALUE(
      base.dim() == 1 && base.size(0) % kBlock == 0 && task_vectors.dim() == 2 &&
          task_vectors.size(1) == base.size(0) && weights.dim() == 1 && weights.size(0) == task_vectors.size(0) &&
          weights.scalar_type() == accumulator(base) && accumulator(task_vectors) == accumulator(base),
      "elected_sum's arguments do not fit: ", base.sizes(), ", ", task_vectors.sizes(), ", ", weights.sizes());
  TORCH_CHECK_VALUE(base.is_cpu() && task_vectors.is_cpu() && weights.is_cpu(), "this operator runs on CPU tensors");
  const auto dense_base = base.contiguous(), tasks = dense_rows(task_vectors);
  const auto rounded = weights.to(tasks.scalar_type()).to(weights.scalar_type()).contiguous();
  const auto out = dense_base.new_empty(dense_base.sizes());
  ElectedSum a;
  a.out = out.mutable_data_ptr();
  a.base = dense_base.const_data_ptr();
  a.task_vectors = tasks.const_data_ptr();
  a.weights = rounded.const_data_ptr();
  a.scale = scale;
  a.normalize = normalize;
  a.num_tasks = tasks.size(0);
  a.task_stride = tasks.stride(0);
  a.base_dtype = dtype_of(dense_base);
  a.task_dtype = dtype_of(tasks);
  const auto loop = loops().elected_sum;
  constexpr int64_t kLeastBlocks = 16;  // fewer do not pay for a thread
  constexpr int64_t kPieceBlocks = 64;
  share_out(base.size(0) / kBlock, kLeastBlocks, kPieceBlocks,
            [&](int64_t first, int64_t last) { loop(a, first, last); });
  return out;
}

}  // namespace samerge
