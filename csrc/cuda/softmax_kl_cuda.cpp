#include <tuple>

#include "../softmax_kl_call.h"
#include "arguments.h"

namespace samerge {

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cuda(
    const at::Tensor& student,                         // [R, V]
    const std::optional<at::Tensor>& teacher,          // [K, R, V]
    const std::optional<at::Tensor>& teacher_weights,  // [K, R]
    const std::optional<at::Tensor>& num_classes,      // [R]
    const std::optional<at::Tensor>& row_scale,        // [R]
    const std::optional<at::Tensor>& out,              // [R, V]
    const std::string& loss, double student_temperature, double teacher_temperature,
    double beta) {  // -> [R], [R, V]
  const c10::cuda::OptionalCUDAGuard guard(student.device());
  const SoftmaxKlCall call(at::kCUDA, student, teacher, teacher_weights, num_classes, row_scale, out, loss,
                           student_temperature, teacher_temperature, beta);
  TORCH_CHECK_VALUE(student.size(1) < (int64_t(1) << 30), "a row has ", student.size(1),
                    " classes; at most 2^30 are possible");
  if (student.size(0)) C10_CUDA_CHECK(gpu::softmax_kl(call.arguments, c10::cuda::getCurrentCUDAStream()));
  return {call.losses, call.grad};
}

}  // namespace samerge
