#include "../elected_sum_call.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

at::Tensor elected_sum_cpu(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                           double scale,
                           bool normalize) {  // [N], [T, N], [T]
  check_elected_sum(base, task_vectors, weights, at::kCPU);
  const auto dense_base = base.contiguous(), tasks = dense_rows(task_vectors),
             rounded = rounded_weights(weights, tasks);
  const auto out = dense_base.new_empty(dense_base.sizes());
  const ElectedSum a = elected_sum_call(out, dense_base, tasks, rounded, scale, normalize);
  const auto loop = loops().elected_sum;
  constexpr int64_t kLeastBlocks = 16;  // fewer do not pay for a thread
  constexpr int64_t kPieceBlocks = 64;
  share_out(base.size(0) / kBlock, kLeastBlocks, kPieceBlocks,
            [&](int64_t first, int64_t last) { loop(a, first, last); });
  return out;
}

}  // namespace samerge
