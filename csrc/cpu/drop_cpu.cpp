#include "../drop_call.h"
#include "levels.h"
#include "parallel.h"

namespace samerge {

void drop_cpu(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& thresholds,
              const at::Tensor& factors) {  // [T, n], [T, n], [T, stretches], [T], [T]
  const Drop a = drop_call(out, numbers, keys, thresholds, factors, at::kCPU);
  const auto loop = loops().drop;
  const int64_t stretches = keys.size(1);
  share_out(a.num_rows * stretches, least_rows(std::min(a.count, kStretch)), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) loop(a, i / stretches, i % stretches);
  });
}

}  // namespace samerge
