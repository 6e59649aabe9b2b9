#include "checks.h"

namespace samerge {
namespace {

constexpr int64_t kRows = 3;
constexpr double kStudentTemperature = 2, kBeta = 0.25;
constexpr double kAgreeing = 0.25;  // norms below which student and teachers nearly agree, and q - p has few digits
constexpr double kMasked = -std::numeric_limits<double>::infinity();

enum class Logits { plain, masked, large };

struct Case {
  RowLoss loss;
  int64_t num_teachers, columns;
  DType student_dtype, teacher_dtype;
  Logits logits;
  bool same_temperature, with_weights, with_num_classes;
};

// The first n of a row; behind them all stays NaN.
void fill_row(Numbers& numbers, int64_t first, int64_t n, Logits kind, int64_t row, bool student) {
  fill(numbers, first, n, 3);
  for (int64_t i = 0; i < n; ++i) {
    if (kind == Logits::large) numbers.set(first + i, numbers[first + i] > 0 ? 1e4 : -1e4);
    // Row 0 has all but its last number masked, so whole chunks of it. A teacher may mask what the student does not, but
    // for reverse KL, which is infinite then.
    const bool masked = row == 0 ? i + 1 < n : i % 3 == 1 || (!student && i % 5 == 4);
    if (kind == Logits::masked && masked) numbers.set(first + i, kMasked);
  }
}

// [n] log softmax(numbers / temperature)
std::vector<double> log_softmax(const Numbers& numbers, int64_t first, int64_t n, double temperature) {
  std::vector<double> y(n);
  double largest = kMasked;
  long double total = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fmax(largest, numbers[first + i]);
  for (int64_t i = 0; i < n; ++i) total += std::exp(y[i] = (numbers[first + i] - largest) / temperature);
  for (double& each : y) each -= std::log(total);
  return y;
}

struct Truth {
  std::vector<double> losses, grad;  // [R], [R, V]
  double parts;                      // the norm of the two parts that a gradient of cross-entropy is the difference of
};

// By the equations of softmax_kl.h. A row's sums are wider than double: equal terms all err to the same side.
Truth plain_sums(const SoftmaxKl& a, const Numbers& student, const Numbers& teacher, const Numbers& weights,
                 const Numbers& row_scale) {
  Truth truth = {std::vector<double>(kRows), std::vector<double>(kRows * a.num_columns), 0};
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t n = a.num_classes ? a.num_classes[r] : a.num_columns;
    const std::vector<double> log_q = log_softmax(student, r * a.student_stride, n, a.student_temperature);
    const double factor = row_scale[r] / a.student_temperature;
    double* grad = truth.grad.data() + r * a.num_columns;
    long double loss = 0;
    if (a.loss == RowLoss::entropy) {
      for (const double y : log_q) loss -= y == kMasked ? 0 : std::exp(y) * y;
      for (int64_t i = 0; i < n; ++i)
        grad[i] = log_q[i] == kMasked ? 0 : -factor * std::exp(log_q[i]) * (log_q[i] + double(loss));
    }
    for (int64_t k = 0; k < a.num_teachers; ++k) {
      const std::vector<double> log_p =
          log_softmax(teacher, k * a.teacher_stride + r * a.teacher_row_stride, n, a.teacher_temperature);
      const double v = a.teacher_weights ? weights[k * kRows + r] : 1. / a.num_teachers;
      const int64_t target = std::max_element(log_p.begin(), log_p.end()) - log_p.begin();
      if (is_centred(a.loss)) {
        const double beta = a.loss == RowLoss::jsd ? a.beta : 0, rest = 1 - beta;  // reverse KL: with m = p
        std::vector<double> of_q(n);
        long double mean = 0;
        for (int64_t i = 0; i < n; ++i) {
          const double p = std::exp(log_p[i]), q = std::exp(log_q[i]);
          const double log_m = a.loss == RowLoss::jsd ? std::log(beta * p + rest * q) : log_p[i];
          of_q[i] = q > 0 ? rest * q * (log_q[i] - log_m) : 0;
          if (p > 0) loss += v * beta * p * (log_p[i] - log_m);
          loss += v * of_q[i], mean += of_q[i];
        }
        for (int64_t i = 0; i < n; ++i) grad[i] += v * factor * (of_q[i] - std::exp(log_q[i]) * double(mean));
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        const double p = a.loss == RowLoss::kl ? std::exp(log_p[i]) : i == target;
        const double log_p_or_0 = a.loss == RowLoss::kl ? log_p[i] : 0;
        if (p > 0) loss += v * p * (log_p_or_0 - log_q[i]);
        grad[i] += v * factor * (std::exp(log_q[i]) - p);
        if (a.loss == RowLoss::cross_entropy)
          truth.parts = std::hypot(truth.parts, v * factor * (std::exp(log_q[i]) + p));
      }
    }
    truth.losses[r] = loss;
  }
  return truth;
}

void softmax_kl_case(const Case& c) {
  const DType real = computed_in(c.student_dtype);
  const int64_t columns = c.columns, student_stride = columns + 3, teacher_row_stride = columns + 1;
  const int64_t teacher_stride = kRows * teacher_row_stride;
  const std::vector<int64_t> num_classes = {columns, columns / 2 + 1, 1};
  Numbers student(c.student_dtype, (kRows - 1) * student_stride + columns), weights(real, c.num_teachers * kRows);
  Numbers teacher(c.teacher_dtype, c.num_teachers ? c.num_teachers * teacher_stride - 1 : 0);
  Numbers row_scale(real, kRows), losses(real, kRows), grad(c.student_dtype, kRows * columns);
  fill(weights, 0, weights.size);
  for (int64_t i = 0; i < weights.size; ++i) weights.set(i, std::fabs(weights[i]));  // so that no losses cancel
  fill(row_scale, 0, kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t n = c.with_num_classes ? num_classes[r] : columns;
    fill_row(student, r * student_stride, n, c.logits, r, true);
    for (int64_t k = 0; k < c.num_teachers; ++k)
      fill_row(teacher, k * teacher_stride + r * teacher_row_stride, n, c.logits, r, c.loss == RowLoss::reverse_kl);
  }

  SoftmaxKl a{};
  a.loss = c.loss;
  a.beta = kBeta;
  a.num_teachers = c.num_teachers;
  a.num_rows = kRows;
  a.num_columns = columns;
  a.student = student.data();
  a.teacher = teacher.data();
  a.teacher_weights = c.with_weights ? weights.data() : nullptr;
  a.num_classes = c.with_num_classes ? num_classes.data() : nullptr;
  a.losses = losses.data();
  a.student_stride = student_stride;
  a.teacher_stride = teacher_stride;
  a.teacher_row_stride = teacher_row_stride;
  a.student_temperature = kStudentTemperature;
  a.teacher_temperature = c.same_temperature ? kStudentTemperature : 1.5;
  a.student_dtype = c.student_dtype;
  a.teacher_dtype = c.teacher_dtype;
  const Truth truth = plain_sums(a, student, teacher, weights, row_scale);

  const int64_t chunks = (columns + kSoftmaxKlChunk - 1) / kSoftmaxKlChunk;
  const int64_t numbers = (1 + c.num_teachers) * (chunks * kSoftmaxKlChunk + chunks + 1);
  const bool aligned = columns * bytes_of(c.student_dtype) % 64 == 0;
  for (const bool with_grad : {false, true})
    for (const bool with_scratch : {false, true}) {
      const bool streamed = with_grad && with_scratch && aligned;
      constexpr const char* names[] = {"kl", "cross_entropy", "entropy", "reverse_kl", "jsd"};
      at_work = std::string("softmax_kl, ") + names[int(c.loss)] + ", student " + name_of(c.student_dtype) +
                ", teachers " + std::to_string(c.num_teachers) + " " + name_of(c.teacher_dtype) +
                ", V = " + std::to_string(columns) +
                (c.logits == Logits::masked  ? ", masked"
                 : c.logits == Logits::large ? ", large"
                                             : "") +
                (c.same_temperature ? ", one temperature" : "") + (c.with_weights ? ", weights" : "") +
                (c.with_num_classes ? ", num_classes" : "") + (with_grad ? ", grad" : "") +
                (with_scratch ? ", scratch" : "") + (streamed ? ", streamed" : "");
      a.row_scale = with_grad ? row_scale.data() : nullptr;
      a.grad = with_grad ? grad.data() : nullptr;
      on_every_level([&] {
        losses.poison();
        grad.poison();
        Numbers scratch(real, with_scratch ? numbers : 0);
        void* const room = with_scratch ? scratch.data() : nullptr;
        loops().softmax_kl(a, 1, 2, room, streamed);
        CHECK(losses.poisoned(0, 1) && losses.poisoned(2, 1));
        CHECK(grad.poisoned(0, columns) && grad.poisoned(2 * columns, columns));
        loops().softmax_kl(a, 2, kRows, room, streamed);
        loops().softmax_kl(a, 0, 1, room, streamed);
        CHECK(close(truth.losses, real, [&](int64_t i) { return losses[i]; }, kAgreeing));
        const double at_least = std::max(kAgreeing, truth.parts);
        if (with_grad) CHECK(close(truth.grad, c.student_dtype, [&](int64_t i) { return grad[i]; }, at_least));
      });
    }
}

}  // namespace

void test_softmax_kl() {
  constexpr DType dtypes[][2] = {{DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::f16, DType::f16},
                                 {DType::f64, DType::f64}, {DType::f32, DType::bf16},  {DType::bf16, DType::f32},
                                 {DType::f16, DType::bf16}};
  for (const RowLoss loss : {RowLoss::kl, RowLoss::cross_entropy, RowLoss::entropy, RowLoss::reverse_kl, RowLoss::jsd})
    for (const auto& dtype : dtypes)
      for (const int64_t columns : {1, 2, 7, 16, 100, 1000, 1024, 1041, 5024})
        for (const Logits logits : {Logits::plain, Logits::masked, Logits::large})
          for (const bool with_num_classes : {false, true})
            for (const int64_t teachers : {1, 3}) {
              const bool entropy = loss == RowLoss::entropy;
              if (entropy && (teachers > 1 || dtype[0] != dtype[1])) continue;
              // Unusual logits, weights and temperatures touch no other addresses: not all combinations are needed.
              const bool several = teachers == 3;
              if (logits != Logits::plain && several != with_num_classes) continue;
              softmax_kl_case({loss, entropy ? 0 : teachers, columns, dtype[0], dtype[1], logits,
                               columns % 2 == int(with_num_classes), !entropy && several, with_num_classes});
            }
}

}  // namespace samerge
