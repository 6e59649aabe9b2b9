#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/levels.h"

namespace samerge {

void weighted_sum_cpu(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                      const at::Tensor& coefficients, const at::Tensor& block_layer,
                      const std::optional<at::Tensor>& scales);

at::Tensor coefficient_grad_cpu(const at::Tensor& grad, const at::Tensor& task_vectors, const at::Tensor& block_layer,
                                int64_t num_layers, const std::optional<at::Tensor>& scales);

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cpu(
    const at::Tensor& student, const std::optional<at::Tensor>& teacher,
    const std::optional<at::Tensor>& teacher_weights, const std::optional<at::Tensor>& num_classes,
    const std::optional<at::Tensor>& row_scale, const std::optional<at::Tensor>& out, const std::string& loss,
    double student_temperature, double teacher_temperature, double beta);

at::Tensor gram_product_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                            const at::Tensor& q, const at::Tensor& scale);

at::Tensor lanczos_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                       const at::Tensor& scale, const at::Tensor& basis, const at::Tensor& projected, int64_t width,
                       int64_t first, int64_t last);

at::Tensor elected_sum_cpu(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                           double scale, bool normalize);

at::Tensor moments_cpu(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases);

void count_digits_cpu(const at::Tensor& counts, const at::Tensor& numbers, const at::Tensor& keys,
                      const at::Tensor& ties, int64_t shift);

void next_digit_cpu(const at::Tensor& counts, const at::Tensor& keys, const at::Tensor& ties, int64_t infinity,
                    bool last);

void trim_cpu(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& ties);

void drop_cpu(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& thresholds,
              const at::Tensor& factors);

void rows_times_transposed_cpu(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix);

void add_rows_times_cpu(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& matrix);

bool map_large_tensors(bool on);

#ifdef SAMERGE_CUDA
void weighted_sum_cuda(const at::Tensor& out, const at::Tensor& base, const at::Tensor& task_vectors,
                       const at::Tensor& coefficients, const at::Tensor& block_layer,
                       const std::optional<at::Tensor>& scales);

at::Tensor coefficient_grad_cuda(const at::Tensor& grad, const at::Tensor& task_vectors, const at::Tensor& block_layer,
                                 int64_t num_layers, const std::optional<at::Tensor>& scales);

std::tuple<at::Tensor, std::optional<at::Tensor>> softmax_kl_cuda(
    const at::Tensor& student, const std::optional<at::Tensor>& teacher,
    const std::optional<at::Tensor>& teacher_weights, const std::optional<at::Tensor>& num_classes,
    const std::optional<at::Tensor>& row_scale, const std::optional<at::Tensor>& out, const std::string& loss,
    double student_temperature, double teacher_temperature, double beta);

at::Tensor gram_product_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                             const at::Tensor& q, const at::Tensor& scale);

at::Tensor lanczos_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases,
                        const at::Tensor& scale, const at::Tensor& basis, const at::Tensor& projected, int64_t width,
                        int64_t first, int64_t last);

at::Tensor elected_sum_cuda(const at::Tensor& base, const at::Tensor& task_vectors, const at::Tensor& weights,
                            double scale, bool normalize);

at::Tensor moments_cuda(const std::vector<at::Tensor>& matrices, const std::vector<at::Tensor>& bases);

void count_digits_cuda(const at::Tensor& counts, const at::Tensor& numbers, const at::Tensor& keys,
                       const at::Tensor& ties, int64_t shift);

void next_digit_cuda(const at::Tensor& counts, const at::Tensor& keys, const at::Tensor& ties, int64_t infinity,
                     bool last);

void trim_cuda(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& ties);

void drop_cuda(const at::Tensor& out, const at::Tensor& numbers, const at::Tensor& keys, const at::Tensor& thresholds,
               const at::Tensor& factors);
#endif

}  // namespace samerge

// Signatures and shapes are those of samerge_ext/reference; the operators in samerge_ext/ops check the arguments.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using without_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("weighted_sum_cpu", samerge::weighted_sum_cpu, without_gil());
  module.def("coefficient_grad_cpu", samerge::coefficient_grad_cpu, without_gil());
  module.def("softmax_kl_cpu", samerge::softmax_kl_cpu, without_gil());
  module.def("gram_product_cpu", samerge::gram_product_cpu, without_gil());
  module.def("lanczos_cpu", samerge::lanczos_cpu, without_gil());
  module.def("moments_cpu", samerge::moments_cpu, without_gil());
  module.def("elected_sum_cpu", samerge::elected_sum_cpu, without_gil());
  module.def("count_digits_cpu", samerge::count_digits_cpu, without_gil());
  module.def("next_digit_cpu", samerge::next_digit_cpu, without_gil());
  module.def("trim_cpu", samerge::trim_cpu, without_gil());
  module.def("drop_cpu", samerge::drop_cpu, without_gil());
  module.def("rows_times_transposed_cpu", samerge::rows_times_transposed_cpu, without_gil());
  module.def("add_rows_times_cpu", samerge::add_rows_times_cpu, without_gil());
  module.def("map_large_tensors", samerge::map_large_tensors,
             "Whether CPU tensors of 1 MiB and more get memory of their own from now on; returns whether they did.");
#ifdef SAMERGE_CUDA
  module.def("weighted_sum_cuda", samerge::weighted_sum_cuda, without_gil());
  module.def("coefficient_grad_cuda", samerge::coefficient_grad_cuda, without_gil());
  module.def("softmax_kl_cuda", samerge::softmax_kl_cuda, without_gil());
  module.def("gram_product_cuda", samerge::gram_product_cuda, without_gil());
  module.def("lanczos_cuda", samerge::lanczos_cuda, without_gil());
  module.def("elected_sum_cuda", samerge::elected_sum_cuda, without_gil());
  module.def("moments_cuda", samerge::moments_cuda, without_gil());
  module.def("count_digits_cuda", samerge::count_digits_cuda, without_gil());
  module.def("next_digit_cuda", samerge::next_digit_cuda, without_gil());
  module.def("trim_cuda", samerge::trim_cuda, without_gil());
  module.def("drop_cuda", samerge::drop_cuda, without_gil());
#endif
  module.def("cpu_level", samerge::cpu_level, "Name of the instruction level in force.");
  module.def("set_cpu_level", samerge::set_cpu_level, "Forces portable, avx2 or avx512; auto takes the best.");
}
