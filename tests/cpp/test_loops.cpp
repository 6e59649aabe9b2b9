// The CPU loops on every instruction level of this machine, beside plain sums in double; without torch, so that the sanitizers
// see all there is. `make sanitize` builds and runs it.
#include <stdexcept>

#include "checks.h"

namespace samerge {
namespace {

// block_layer of `blocks` blocks: layer 1 has none, layer 2 all but the first.
std::vector<int32_t> block_layers(int64_t blocks) {
  std::vector<int32_t> layer(blocks, 2);
  layer[0] = 0;
  return layer;
}
constexpr int64_t kLayers = 3;

// [T, N], rows `stride` apart; what lies between them stays NaN.
void fill_rows(Numbers& rows, int64_t stride, int64_t n) {
  for (int64_t first = 0; first < rows.size; first += stride) fill(rows, first, n);
}

void weighted_sum_case(int64_t num_tasks, int64_t blocks, int64_t gap, DType base_dtype, DType task_dtype,
                       DType out_dtype) {
  const int64_t n = blocks * kBlock, stride = n + gap;
  Numbers out(out_dtype, n), base(base_dtype, n), tasks(task_dtype, (num_tasks - 1) * stride + n);
  Numbers coefficients(computed_in(base_dtype), num_tasks * kLayers);
  const std::vector<int32_t> layer = block_layers(blocks);
  fill(base, 0, n);
  fill_rows(tasks, stride, n);
  fill(coefficients, 0, coefficients.size);
  std::vector<double> truth(n);
  for (int64_t i = 0; i < n; ++i) {
    truth[i] = base[i];
    for (int64_t t = 0; t < num_tasks; ++t)
      truth[i] += coefficients[t * kLayers + layer[i / kBlock]] * tasks[t * stride + i];
  }
  const WeightedSum a = {out.data(), base.data(), tasks.data(), coefficients.data(), layer.data(), num_tasks,
                         kLayers,    stride,      out_dtype,    base_dtype,          task_dtype};
  for (const bool streamed : {false, true}) {
    at_work = std::string("weighted_sum, base ") + name_of(base_dtype) + ", task vectors " + name_of(task_dtype) +
              ", out " + name_of(out_dtype) + ", T = " + std::to_string(num_tasks) +
              ", blocks = " + std::to_string(blocks) + (streamed ? ", streamed" : "");
    on_every_level([&] {
      out.poison();
      // A streaming store is an intrinsic that AddressSanitizer does not watch: blocks outside of a range show what it hits.
      const int64_t last = blocks > 2 ? blocks - 1 : blocks, first = last > 1 ? 1 : 0;
      loops().weighted_sum(a, first, last, streamed);
      CHECK(out.poisoned(0, first * kBlock) && out.poisoned(last * kBlock, n - last * kBlock));
      loops().weighted_sum(a, 0, first, streamed);
      loops().weighted_sum(a, last, blocks, streamed);
      CHECK(close(truth, out_dtype, [&](int64_t i) { return out[i]; }));
    });
  }
}

void coefficient_grad_case(int64_t num_tasks, int64_t gap, DType grad_dtype, DType task_dtype) {
  const std::vector<int64_t> segment_begin = {0, 1, 3, 7};
  const int64_t segments = segment_begin.size() - 1, n = segment_begin.back() * kBlock, stride = n + gap;
  Numbers grad(grad_dtype, n), tasks(task_dtype, (num_tasks - 1) * stride + n),
      partials(DType::f64, segments * num_tasks);
  fill(grad, 0, n);
  fill_rows(tasks, stride, n);
  std::vector<double> truth(partials.size);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t t = 0; t < num_tasks; ++t)
      for (int64_t i = segment_begin[s] * kBlock; i < segment_begin[s + 1] * kBlock; ++i)
        truth[s * num_tasks + t] += grad[i] * tasks[t * stride + i];
  const CoefficientGrad a = {static_cast<double*>(partials.data()),
                             grad.data(),
                             tasks.data(),
                             segment_begin.data(),
                             num_tasks,
                             stride,
                             grad_dtype,
                             task_dtype};
  at_work = std::string("coefficient_grad, grad ") + name_of(grad_dtype) + ", task vectors " + name_of(task_dtype) +
            ", T = " + std::to_string(num_tasks);
  on_every_level([&] {
    partials.poison();
    loops().coefficient_grad(a, 1, 2);
    CHECK(partials.poisoned(0, num_tasks) && partials.poisoned(2 * num_tasks, num_tasks));
    loops().coefficient_grad(a, 2, segments);
    loops().coefficient_grad(a, 0, 1);
    CHECK(close(truth, computed_in(grad_dtype), [&](int64_t i) { return partials[i]; }));
  });
}

// Weights are powers of two: products are exact, whatever they are rounded to, and so elect the same sign here.
void elected_sum_case(int64_t num_tasks, int64_t gap, DType base_dtype, DType task_dtype, bool normalize) {
  const int64_t blocks = 3, n = blocks * kBlock, stride = n + gap;
  const double scale = 0.7;
  Numbers out(base_dtype, n), base(base_dtype, n), tasks(task_dtype, (num_tasks - 1) * stride + n);
  Numbers weights(computed_in(base_dtype), num_tasks);
  fill(base, 0, n);
  fill_rows(tasks, stride, n);
  for (int64_t t = 0; t < num_tasks; ++t) {
    weights.set(t, std::ldexp(1, t % 3 - 1));
    tasks.set(t * stride + 5, 0);                                             // nobody is elected
    tasks.set(t * stride + n - 1, t % 2 ? -1 / weights[t] : 1 / weights[t]);  // a tie where T is even
  }
  std::vector<double> truth(n);
  for (int64_t i = 0; i < n; ++i) {
    double total = 0, sum = 0, divisor = 0;
    for (int64_t t = 0; t < num_tasks; ++t) total += weights[t] * tasks[t * stride + i];
    for (int64_t t = 0; t < num_tasks; ++t) {
      const double product = weights[t] * tasks[t * stride + i];
      if (total >= 0 ? product <= 0 : product >= 0) continue;
      sum += product;
      divisor += weights[t];
    }
    truth[i] = base[i] + scale * (normalize && divisor ? sum / divisor : sum);
  }
  const ElectedSum a = {out.data(), base.data(), tasks.data(), weights.data(), scale,
                        normalize,  num_tasks,   stride,       base_dtype,     task_dtype};
  at_work = std::string("elected_sum, base ") + name_of(base_dtype) + ", task vectors " + name_of(task_dtype) +
            ", T = " + std::to_string(num_tasks) + (normalize ? ", normalised" : "");
  on_every_level([&] {
    out.poison();
    loops().elected_sum(a, 1, 2);
    CHECK(out.poisoned(0, kBlock) && out.poisoned(2 * kBlock, kBlock));
    loops().elected_sum(a, 2, blocks);
    loops().elected_sum(a, 0, 1);
    CHECK(close(truth, base_dtype, [&](int64_t i) { return out[i]; }));
  });
}

// Rounded to quarters, so that many are equal: digits are counted one by one, and trimmed are all but the first 5 of the numbers
// that equal the tenth.
void magnitudes_case(DType dtype, int64_t n) {
  const int bytes = int(bytes_of(dtype)), shift = 8 * bytes - 16;
  Numbers numbers(dtype, n), trimmed(dtype, n);
  fill(numbers, 0, n, 2);
  for (int64_t i = 0; i < n; ++i) numbers.set(i, std::round(4 * numbers[i]) / 4);
  const auto bits = [&](int64_t i) {
    uint64_t all = 0;
    std::memcpy(&all, static_cast<const char*>(numbers.data()) + i * bytes, bytes);  // little-endian
    return all & ((uint64_t(1) << (8 * bytes - 1)) - 1);
  };
  const uint64_t key = bits(std::min<int64_t>(9, n - 1));
  const int64_t prefix = shift ? int64_t(key >> shift) : -1;
  std::vector<int64_t> first(kDigits), second(kDigits), counts(kDigits);
  std::vector<double> kept[3];  // with 5 of the equal ones, none, all
  int64_t equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    ++first[bits(i) >> shift];
    if (shift && int64_t(bits(i) >> shift) == prefix) ++second[bits(i) >> (shift - 16) & 0xffff];
    equal += bits(i) == key;
    const int64_t most[] = {5, 0, n};
    for (int k = 0; k < 3; ++k)
      kept[k].push_back(bits(i) > key || (bits(i) == key && equal <= most[k]) ? numbers[i] : 0);
  }
  at_work = std::string("magnitudes, ") + name_of(dtype) + ", n = " + std::to_string(n);
  on_every_level([&] {
    std::fill(counts.begin(), counts.end(), 0);
    loops().count_digits(numbers.data(), n, bytes, shift, -1, counts.data());
    CHECK(counts == first);
    if (shift) {
      std::fill(counts.begin(), counts.end(), 0);
      loops().count_digits(numbers.data(), n, bytes, shift - 16, prefix, counts.data());
      CHECK(counts == second);
    }
    const int64_t ties[] = {5, 0, -1};
    for (int k = 0; k < 3; ++k) {
      const int64_t left = loops().trim(trimmed.data(), numbers.data(), n, bytes, key, ties[k]);
      CHECK(left == (k ? ties[k] : std::max<int64_t>(0, 5 - equal)));
      for (int64_t i = 0; i < n; ++i) CHECK(trimmed[i] == kept[k][i]);
    }
  });
}

// Of two rows one keeps half of its numbers, the other all, doubled, which no format rounds.
void drop_case(DType dtype, int64_t n) {
  Numbers numbers(dtype, 2 * n), dropped(dtype, 2 * n);
  fill(numbers, 0, 2 * n);
  const int64_t stretches = (n + kStretch - 1) / kStretch, thresholds[] = {int64_t(1) << 30, int64_t(1) << 31};
  std::vector<int32_t> keys(2 * stretches);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = int32_t(i * 0x12345677u);
  const float narrow[] = {2, 2};
  const double wide[] = {2, 2};
  const void* factors = dtype == DType::f64 ? static_cast<const void*>(wide) : narrow;
  const Drop a = {dropped.data(), numbers.data(), keys.data(), thresholds, factors, 2, n, n, n, dtype};
  at_work = std::string("drop, ") + name_of(dtype) + ", n = " + std::to_string(n);
  on_every_level([&] {
    dropped.poison();
    for (int64_t i = 0; i < 2 * stretches; ++i) loops().drop(a, i / stretches, i % stretches);
    for (int64_t i = 0; i < 2 * n; ++i) {
      const int64_t row = i / n, place = i % n;
      const uint32_t key = keys[row * stretches + place / kStretch];
      const bool kept = uniform(uint32_t(place % kStretch), key) < thresholds[row];
      CHECK(dropped[i] == (kept ? 2 * numbers[i] : 0));
    }
  });
}

// Codes of T task vectors, rows apart, in memory that ends where they end, and the numbers that they stand for.
struct Codes {
  const int64_t bytes_of_row, stride, scale_stride;
  std::unique_ptr<uint8_t[]> bytes;
  Numbers scales;
  std::vector<double> numbers;  // [T, N]

  Codes(DType dtype, int64_t num_tasks, int64_t n, int64_t gap)
      : bytes_of_row(dtype == DType::i8 ? n : n / 2),
        stride(bytes_of_row + gap),
        scale_stride(n / kGroup + gap),
        bytes(new uint8_t[(num_tasks - 1) * stride + bytes_of_row]),
        scales(DType::bf16, (num_tasks - 1) * scale_stride + n / kGroup),
        numbers(num_tasks * n) {
    fill(scales, 0, scales.size);
    uint32_t random = 1;
    for (int64_t t = 0; t < num_tasks; ++t) {
      uint8_t* row = bytes.get() + t * stride;
      for (int64_t i = 0; i < bytes_of_row; ++i) row[i] = (random = random * 1664525u + 1013904223u) >> 24;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t group = i / kGroup, place = i % kGroup;
        const int pair = row[group * (kGroup / 2) + place % (kGroup / 2)];
        const int code = dtype == DType::i8 ? int8_t(row[i]) : (place < kGroup / 2 ? pair & 15 : pair >> 4) - 8;
        numbers[t * n + i] = code * scales[t * scale_stride + group];
      }
    }
  }
};

void codes_case(int64_t num_tasks, int64_t gap, DType dtype, DType task_dtype) {
  const std::vector<int64_t> segment_begin = {0, 1, 3, 5};
  const int64_t segments = segment_begin.size() - 1, blocks = segment_begin.back(), n = blocks * kBlock;
  const std::vector<int32_t> layer = block_layers(blocks);
  Codes codes(task_dtype, num_tasks, n, gap);
  const auto* scales = static_cast<const uint16_t*>(codes.scales.data());
  Numbers base(dtype, n), out(dtype, n), coefficients(computed_in(dtype), num_tasks * kLayers);
  Numbers partials(DType::f64, segments * num_tasks);
  fill(base, 0, n);
  fill(coefficients, 0, coefficients.size);
  std::vector<double> merged(n), contracted(partials.size);
  for (int64_t i = 0; i < n; ++i) merged[i] = base[i];
  for (int64_t t = 0; t < num_tasks; ++t)
    for (int64_t i = 0; i < n; ++i)
      merged[i] += coefficients[t * kLayers + layer[i / kBlock]] * codes.numbers[t * n + i];
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t t = 0; t < num_tasks; ++t)
      for (int64_t i = segment_begin[s] * kBlock; i < segment_begin[s + 1] * kBlock; ++i)
        contracted[s * num_tasks + t] += base[i] * codes.numbers[t * n + i];
  const WeightedSum merge = {out.data(),
                             base.data(),
                             codes.bytes.get(),
                             coefficients.data(),
                             layer.data(),
                             num_tasks,
                             kLayers,
                             codes.stride,
                             dtype,
                             dtype,
                             task_dtype,
                             scales,
                             codes.scale_stride};
  const CoefficientGrad contract = {static_cast<double*>(partials.data()),
                                    base.data(),
                                    codes.bytes.get(),
                                    segment_begin.data(),
                                    num_tasks,
                                    codes.stride,
                                    dtype,
                                    task_dtype,
                                    scales,
                                    codes.scale_stride};
  at_work = std::string("codes of ") + (task_dtype == DType::i8 ? "8" : "4") + " bits, base " + name_of(dtype) +
            ", T = " + std::to_string(num_tasks);
  on_every_level([&] {
    out.poison();
    partials.poison();
    loops().weighted_sum(merge, 0, blocks, false);
    CHECK(close(merged, dtype, [&](int64_t i) { return out[i]; }));
    loops().coefficient_grad(contract, 0, segments);
    CHECK(close(contracted, computed_in(dtype), [&](int64_t i) { return partials[i]; }));
  });
}

constexpr DType kNarrow[] = {DType::f32, DType::bf16, DType::f16};

}  // namespace

void test_weighted_sum() {
  for (const int64_t num_tasks : {1, 3, 8, 11})
    for (const int64_t blocks : {1, 2, 5}) {
      const int64_t gap = num_tasks == 3 ? 0 : 7;
      weighted_sum_case(num_tasks, blocks, gap, DType::f64, DType::f64, DType::f64);
      for (const DType base : kNarrow)
        for (const DType task : kNarrow)
          weighted_sum_case(num_tasks, blocks, gap, base, task, kNarrow[(int(base) + int(task)) % 3]);
      for (const DType dtype : kNarrow) weighted_sum_case(num_tasks, blocks, gap, dtype, dtype, dtype);
    }
}

void test_coefficient_grad() {
  for (const int64_t num_tasks : {1, 3, 8, 11}) {
    const int64_t gap = num_tasks == 3 ? 0 : 7;
    coefficient_grad_case(num_tasks, gap, DType::f64, DType::f64);
    for (const DType grad : kNarrow)
      for (const DType task : kNarrow) coefficient_grad_case(num_tasks, gap, grad, task);
  }
}

void test_elected_sum() {
  for (const int64_t num_tasks : {1, 2, 8, 11})
    for (const bool normalize : {false, true}) {
      elected_sum_case(num_tasks, 7, DType::f64, DType::f64, normalize);
      for (const DType base : kNarrow)
        for (const DType task : kNarrow) elected_sum_case(num_tasks, 7, base, task, normalize);
    }
}

void test_magnitudes() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
    for (const int64_t n : {1, 17, 1024, 2500}) magnitudes_case(dtype, n);
}

void test_drop() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
    for (const int64_t n : {1, 17, 1024, 2500, int(kStretch) + 3}) drop_case(dtype, n);
}

void test_codes() {
  for (const int64_t num_tasks : {1, 2, 3, 8, 11})
    for (const DType task : {DType::i8, DType::i4})
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) codes_case(num_tasks, 5, dtype, task);
}

}  // namespace samerge

int main() {
  using namespace samerge;
  for (const char* name : {"portable", "avx2", "avx512"}) try {
      set_cpu_level(name);
      tested_levels.push_back({name, 0});
    } catch (const std::invalid_argument&) {
      std::printf("%s: does not run on this machine\n", name);
    }
  test_weighted_sum();
  test_coefficient_grad();
  test_elected_sum();
  test_magnitudes();
  test_drop();
  test_codes();
  test_softmax_kl();
  test_moments();
  test_gram_product();
  test_orthogonalise();
  test_row_products();
  for (const TestedLevel& level : tested_levels)
    std::printf("%s: %lld calls agree with plain sums\n", level.name, (long long)level.calls);
}
