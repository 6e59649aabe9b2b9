// moments and gram_product: sums over W[i] = bases[i] + matrices[i], of a batch of two matrices.
#include <deque>

#include "checks.h"

namespace samerge {
namespace {

constexpr int64_t kBatch = 2;

struct Matrices {
  int64_t rows, columns, stride;
  std::deque<Numbers> numbers;
  std::vector<const void*> pointers;

  Matrices(DType dtype, int64_t rows, int64_t columns, int64_t gap)
      : rows(rows), columns(columns), stride(columns + gap) {
    for (int64_t i = 0; i < kBatch; ++i) {
      Numbers& matrix = numbers.emplace_back(dtype, (rows - 1) * stride + columns);
      for (int64_t r = 0; r < rows; ++r) fill(matrix, r * stride, columns);
      pointers.push_back(matrix.data());
    }
  }

  double at(int64_t i, int64_t row, int64_t column) const { return numbers[i][row * stride + column]; }
};

// What MomentsCall and GramProduct have in common.
template <class Call>
Call call_with(const Matrices& matrices, DType matrix_dtype, const Matrices* bases, DType base_dtype) {
  Call a{};
  a.matrices = matrices.pointers.data();
  a.bases = bases ? bases->pointers.data() : nullptr;
  a.rows = matrices.rows;
  a.columns = matrices.columns;
  a.matrix_stride = matrices.stride;
  a.base_stride = bases ? bases->stride : 0;
  a.matrix_dtype = matrix_dtype;
  a.base_dtype = base_dtype;
  return a;
}

template <class Test>
void with_and_without_base(const std::vector<std::vector<int64_t>>& shapes, const Test& test) {
  constexpr DType dtypes[][2] = {
      {DType::f32, DType::f32}, {DType::bf16, DType::f32}, {DType::f16, DType::bf16}, {DType::f64, DType::f64}};
  for (const auto& shape : shapes)
    for (const auto& dtype : dtypes) {
      const Matrices matrices(dtype[0], shape[0], shape[1], 3), bases(dtype[1], shape[0], shape[1], 0);
      for (const Matrices* base : {static_cast<const Matrices*>(nullptr), &bases}) {
        at_work = std::string(name_of(dtype[0])) + " [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                  "]" + (base ? std::string(", base ") + name_of(dtype[1]) : "");
        test(matrices, dtype[0], base, dtype[1]);
      }
    }
}

double weight(const Matrices& matrices, const Matrices* bases, int64_t i, int64_t row, int64_t column) {
  return matrices.at(i, row, column) + (bases ? bases->at(i, row, column) : 0);
}

}  // namespace

void test_moments() {
  with_and_without_base({{1, 1}, {3, 7}, {2, 1024}, {3, 1041}, {131, 33}},
                        [](const Matrices& matrices, DType dtype, const Matrices* bases, DType base_dtype) {
    auto a = call_with<MomentsCall>(matrices, dtype, bases, base_dtype);
    const int64_t pieces = a.rows * ((a.columns + kPiece - 1) / kPiece);
    a.segments = (pieces + kSegmentPieces - 1) / kSegmentPieces;
    Numbers partials(DType::f64, kBatch * a.segments * 4);
    a.partials = static_cast<Moments*>(partials.data());
    std::vector<double> truth;
    for (int64_t i = 0; i < kBatch; ++i) {
      long double mean = 0, squares = 0;  // the loop's error is below that of a plain sum in double
      double largest = 0;
      for (int64_t k = 0; k < a.rows * a.columns; ++k)
        mean += weight(matrices, bases, i, k / a.columns, k % a.columns) / (a.rows * a.columns);
      for (int64_t k = 0; k < a.rows * a.columns; ++k) {
        const double w = weight(matrices, bases, i, k / a.columns, k % a.columns);
        squares += (w - mean) * (w - mean);
        largest = std::fmax(largest, std::fabs(w));
      }
      truth.insert(truth.end(), {double(a.rows * a.columns), double(mean), double(squares), largest});
    }
    at_work = "moments, " + at_work;
    on_every_level([&] {
      partials.poison();
      loops().moments(a, 0, 1);
      CHECK(partials.poisoned(4, partials.size - 4));
      loops().moments(a, 1, kBatch * a.segments);
      std::vector<double> result;
      for (int64_t i = 0; i < kBatch; ++i) {
        Moments total = {};
        for (int64_t s = 0; s < a.segments; ++s) combine(total, a.partials[i * a.segments + s]);
        result.insert(result.end(), {total.count, total.mean, total.squares, total.largest});
      }
      CHECK(close(truth, DType::f64, [&](int64_t i) { return result[i]; }));
    });
  });
}

void test_gram_product() {
  with_and_without_base({{1, 1}, {7, 3}, {3, 7}, {64, 64}, {130, 33}, {33, 130}},
                        [](const Matrices& matrices, DType dtype, const Matrices* bases, DType base_dtype) {
    auto a = call_with<GramProduct>(matrices, dtype, bases, base_dtype);
    a.wide = dtype == DType::f64 || a.columns % 2;  // narrow matrices are multiplied in either
    a.width = 2 * kWidth;
    a.chunk = 64;
    const int64_t side = a.side(), longer = a.tall() ? a.rows : a.columns, numbers = a.width * side;
    a.chunks = (longer + a.chunk - 1) / a.chunk;
    const DType real = a.wide ? DType::f64 : DType::f32;
    const double scale[kBatch] = {0.5, -3};
    Numbers q(real, kBatch * numbers), partials(real, kBatch * a.chunks * numbers);
    fill(q, 0, q.size);
    a.q = q.data();
    a.scale = scale;
    a.partials = partials.data();
    std::vector<double> truth(q.size);
    for (int64_t j = 0; j < kBatch * a.width; ++j)
      for (int64_t k = 0; k < longer; ++k) {
        const int64_t i = j / a.width;
        const auto w = [&](int64_t s) {
          return scale[i] * (a.tall() ? weight(matrices, bases, i, k, s) : weight(matrices, bases, i, s, k));
        };
        double y = 0;
        for (int64_t s = 0; s < side; ++s) y += q[j * side + s] * w(s);
        for (int64_t s = 0; s < side; ++s) truth[j * side + s] += y * w(s);
      }
    at_work = "gram_product, " + at_work;
    on_every_level([&] {
      partials.poison();
      const int64_t scratch_bytes = loops().gram_product(a, 0, 0, nullptr);
      Numbers scratch(DType::f64, scratch_bytes / 8);
      loops().gram_product(a, 0, 1, scratch.data());
      CHECK(partials.poisoned(numbers, partials.size - numbers));
      loops().gram_product(a, 1, kBatch * a.chunks, scratch.data());
      CHECK(close(truth, real, [&](int64_t i) {
        double total = 0;
        for (int64_t c = 0; c < a.chunks; ++c) total += partials[(i / numbers * a.chunks + c) * numbers + i % numbers];
        return total;
      }));
    });
  });
}

// With z of one chunk or two, of which the second matrix has nothing that leaves the known vectors.
void test_orthogonalise() {
  for (const DType real : {DType::f32, DType::f64})
    for (const int64_t side : {20, 32, 45})
      for (const int64_t chunks : {1, 2}) {
        at_work = std::string("orthogonalise, ") + name_of(real) + ", side " + std::to_string(side);
        Lanczos a{};
        a.wide = real == DType::f64;
        a.side = side;
        a.width = 2 * kWidth;
        a.known = a.width;
        a.capacity = 2 * a.width;
        a.size = a.known;
        a.chunks = chunks;
        a.stride = (side + kBasisLanes - 1) / kBasisLanes * kBasisLanes;
        const int64_t numbers = a.width * side;
        Numbers basis(real, kBatch * a.capacity * a.stride), q(real, kBatch * numbers);
        Numbers partials(real, kBatch * chunks * numbers);
        Numbers projected(DType::f64, kBatch * a.size * a.size), leaving(DType::f64, kBatch * a.width * a.width);
        fill(partials, 0, partials.size);
        for (int64_t k = (chunks * numbers); k < partials.size; ++k) partials.set(k, k % side < a.width ? 0.5 : 0);
        on_every_level([&] {
          for (int64_t k = 0; k < basis.size; ++k)
            basis.set(k, k / a.stride % a.capacity == k % a.stride && k % a.stride < a.known);  // unit vectors
          q.poison();
          projected.poison();
          leaving.poison();
          a.basis = basis.data();
          a.q = q.data();
          a.partials = partials.data();
          a.projected = static_cast<double*>(projected.data());
          a.leaving = static_cast<double*>(leaving.data());
          Numbers scratch(real, loops().orthogonalise(a, 0, 0, nullptr) / bytes_of(real));
          loops().orthogonalise(a, 0, 1, scratch.data());
          CHECK(q.poisoned(numbers, numbers) && leaving.poisoned(a.width * a.width, a.width * a.width));
          loops().orthogonalise(a, 1, kBatch, scratch.data());
          const double room = real == DType::f64 ? 1e-13 : 1e-5;
          for (int64_t i = 0; i < kBatch; ++i)
            for (int64_t j = 0; j < a.width; ++j) {
              const auto row = [&](int64_t r, int64_t k) { return basis[(i * a.capacity + r) * a.stride + k]; };
              for (int64_t r = 0; r <= a.known + j; ++r) {
                double product = 0;
                for (int64_t k = 0; k < side; ++k) product += row(a.known + j, k) * row(r, k);
                CHECK(std::fabs(product - (r == a.known + j)) < room);
              }
              for (int64_t k = 0; k < side; ++k) {
                double z = 0, found = 0;
                for (int64_t c = 0; c < chunks; ++c) z += partials[((i * chunks + c) * a.width + j) * side + k];
                for (int64_t r = 0; r < a.known; ++r) found += projected[(i * a.size + j) * a.size + r] * row(r, k);
                for (int64_t r = 0; r < a.width; ++r)
                  found += leaving[(i * a.width + j) * a.width + r] * row(a.known + r, k);
                CHECK(std::fabs(z - found) < 10 * room);
                CHECK(q[(i * a.width + j) * side + k] == row(a.known + j, k));
              }
            }
        });
      }
}

// W's rows, those of the R rows and of the results lie apart; what lies between them is NaN.
void test_row_products() {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
    for (const auto& shape : std::vector<std::vector<int64_t>>{{1, 1, 1}, {7, 49, 33}, {5, 600, 35}, {113, 97, 530}}) {
      const int64_t num_rows = shape[0], height = shape[1], width = shape[2], gap = 3;
      const DType real = computed_in(dtype);
      RowProducts a{};
      a.num_rows = num_rows;
      a.padded = (num_rows + kRowPadding - 1) / kRowPadding * kRowPadding;
      a.height = height;
      a.width = width;
      a.matrix_stride = width + gap;
      a.matrix_dtype = dtype;
      const auto strided = [&](DType of, int64_t rows, int64_t columns) {
        Numbers numbers(of, rows * (columns + gap) - gap);
        for (int64_t row = 0; row < rows; ++row) fill(numbers, row * (columns + gap), columns);
        return numbers;
      };
      Numbers matrix = strided(dtype, height, width), deep = strided(real, num_rows, height),
              turned(real, width * a.padded);
      Numbers tall(real, num_rows * (height + gap) - gap), wide(real, num_rows * (width + gap) - gap);
      a.matrix = matrix.data();
      for (int64_t k = 0; k < turned.size; ++k) turned.set(k, 0);
      for (int64_t k = 0; k < width; ++k) fill(turned, k * a.padded, num_rows);
      std::vector<double> of_transposed(num_rows * height), of_matrix(num_rows * width);
      for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t v = 0; v < height; ++v)
          for (int64_t h = 0; h < width; ++h) {
            const double w = matrix[v * a.matrix_stride + h];
            of_transposed[r * height + v] += turned[h * a.padded + r] * w;
            of_matrix[r * width + h] += deep[r * (height + gap) + v] * w;
          }
      at_work = std::string("row_products, ") + name_of(dtype) + " [" + std::to_string(num_rows) + ", " +
                std::to_string(height) + ", " + std::to_string(width) + "]";
      // The whole product in two ranges, of which the second is first.
      const auto run = [&](auto loop, Numbers& out, const void* rows, int64_t row_stride, int64_t columns,
                           int64_t units) {
        a.out = out.data();
        a.out_stride = columns + gap;
        a.rows = rows;
        a.row_stride = row_stride;
        Numbers scratch(DType::f64, loop(a, 0, 0, nullptr) / 8);
        loop(a, units / 2, units, scratch.data());
        loop(a, 0, units / 2, scratch.data());
        for (int64_t row = 0; row + 1 < num_rows; ++row) CHECK(out.poisoned(row * (columns + gap) + columns, gap));
      };
      on_every_level([&] {
        tall.poison();
        run(loops().rows_times_transposed, tall, turned.data(), a.padded, height, (height + kSlabRows - 1) / kSlabRows);
        CHECK(close(of_transposed, real, [&](int64_t i) { return tall[i / height * (height + gap) + i % height]; }));
        wide.poison();
        for (int64_t r = 0; r < num_rows; ++r)
          for (int64_t h = 0; h < width; ++h) wide.set(r * (width + gap) + h, 1);  // what is there is added to
        run(loops().add_rows_times, wide, deep.data(), height + gap, width, (width + kUnitColumns - 1) / kUnitColumns);
        CHECK(close(of_matrix, real, [&](int64_t i) { return wide[i / width * (width + gap) + i % width] - 1; }));
      });
    }
}

}  // namespace samerge
