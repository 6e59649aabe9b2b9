#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "arguments.h"
#include "levels.h"

namespace samerge {

constexpr int64_t kBlocksPerThread = 32;  // fewer do not pay for a thread

void weighted_sum_cpu(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                      const at::Tensor& coefficients,
                      const at::Tensor& block_layer) {  // [N], [N], [T, N], [T, L], [N / kBlock]
  const auto layer = block_layer.contiguous();
  check_packed(base, task_vectors, layer, at::kCPU);
  check_block_layer(layer, coefficients.size(1));
  TORCH_CHECK_VALUE(out.sizes() == base.sizes() && out.is_contiguous() && out.device().is_cpu() &&
                        accumulator(out) == accumulator(base),
                    "out must be contiguous, of the base's shape, and float64 only where base is");
  TORCH_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(0) == task_vectors.size(0) &&
                        coefficients.scalar_type() == accumulator(base) && coefficients.device().is_cpu(),
                    "coefficients must be [T, L] of the accumulation dtype");
  if (base.numel() == 0) return;
  const auto dense_base = base.contiguous(), tasks = dense_rows(task_vectors), lambda = coefficients.contiguous();

  WeightedSum a;
  a.out = out.mutable_data_ptr();
  a.base = dense_base.const_data_ptr();
  a.task_vectors = tasks.const_data_ptr();
  a.coefficients = lambda.const_data_ptr();
  a.block_layer = layer.const_data_ptr<int32_t>();
  a.num_tasks = tasks.size(0);
  a.num_layers = lambda.size(1);
  a.task_stride = tasks.stride(0);
  a.out_dtype = dtype_of(out);
  a.base_dtype = dtype_of(base);
  a.task_dtype = dtype_of(tasks);
  const auto loop = loops().weighted_sum;
  at::parallel_for(0, layer.numel(), kBlocksPerThread, [&](int64_t first, int64_t last) { loop(a, first, last); });
}

}  // namespace samerge
