#include <ATen/Parallel.h>

#include <cmath>

#include "../moments_call.h"
#include "levels.h"

namespace samerge {

at::Tensor moments_cpu(const std::vector<at::Tensor>& matrices,
                       const std::vector<at::Tensor>& bases) {  // B of [m, n] -> [B, 4]
  const auto pointers = addresses(matrices, at::kCPU), base_pointers = addresses(bases, at::kCPU);
  MomentsCall a = moments_call(matrices, bases);
  const int64_t batch = matrices.size();
  std::vector<Moments> partials(batch * a.segments);
  a.partials = partials.data();
  a.matrices = pointers.data();
  a.bases = bases.empty() ? nullptr : base_pointers.data();
  const auto loop = loops().moments;
  at::parallel_for(0, batch * a.segments, 1, [&](int64_t first, int64_t last) { loop(a, first, last); });

  const auto out = matrices[0].new_empty({batch, 4}, matrices[0].options().dtype(at::kDouble));
  auto* row = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < batch; ++i, row += 4) {
    Moments total = {};
    for (int64_t s = 0; s < a.segments; ++s) combine(total, partials[i * a.segments + s]);
    row[0] = total.mean;
    row[1] = total.count ? total.squares / total.count : 0;
    row[2] = std::sqrt(total.squares + total.count * total.mean * total.mean);
    row[3] = total.largest;
  }
  return out;
}

}  // namespace samerge
