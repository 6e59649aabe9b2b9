// Loss and gradient of every row of logits; the equations are in softmax_kl.h.
//
// A team works on one row after another: a warp where rows are short, else a block of threads, else a cluster of up to eight
// blocks, each with its share of the columns. A first pass finds each row's largest logit m and Z, the sum of
// exp((x - m) / temperature), every thread rescaling its own sum when it meets a larger m; a second pass computes loss and
// gradient. Where a gradient needs a sum over the row first, as those of reverse KL and the Jensen-Shannon divergence do, the
// second pass has the loss and that sum, and a third the gradient. A block brings its share of student and teachers into shared
// memory, all of it in flight at once, and all passes read it there: every logit comes from memory once. Clusters exist to make
// the shares small enough. Where there are none (before sm_90) or rows are longer still, the later passes read again, from the L2
// cache as far as it reaches. Moves (K + 1) reads and 1 write per number.
#include "softmax_kl_row.cuh"

namespace samerge::gpu {
namespace {

template <class Team, class Row, int kCount, class Real>
__device__ Normalizer<Real> normalize(const Team& team, const Row& row, const Share& share,
                                      Temperature<Real> temperature, bool with_entropy) {
  Partition<Real, Real> seen = {-INFINITY, 0, 0};
  row.first_pass(share, [&](int, const Real* x) {
    Real larger = seen.max;
#pragma unroll
    for (int k = 0; k < kCount; ++k) larger = x[k] > larger ? x[k] : larger;
    if (larger > seen.max) seen = temperature.rescale(seen, larger);
    const Real m = finite(seen.max);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Real e = temperature.exp(x[k] - m);
      seen.sum += e;
      if (with_entropy && e != 0) seen.weighted += e * (x[k] - m) * temperature.inverse;
    }
  });
  seen = temperature.rescale(seen, team.max(seen.max));
  const Real sum = team.sum(seen.sum), weighted = with_entropy ? team.sum(seen.weighted) : 0, log_sum = log(sum);
  return {seen.max, 1 / sum, log_sum, log_sum - weighted / sum};
}

// The first position of the largest number.
template <class Team, class Row, int kCount, class Real>
__device__ int argmax(const Team& team, const Row& row, const Share& share) {
  Real best = -INFINITY;
  int position = 0;
  row.first_pass(share, [&](int chunk, const Real* x) {
    const Place<Team, kCount> at(share, chunk);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (x[k] > best) position = at[k];
      best = x[k] > best ? x[k] : best;
    }
  });
  return team.min(best == team.max(best) ? position : INT_MAX);
}

// kCentred: reverse KL and the Jensen-Shannon divergence, in a kernel of their own, since they take more registers.
template <class Team, class Student, class Taught, bool kCentred>
__global__ void __launch_bounds__(kThreads, sizeof(Student) == 8 ? 1
                                            : kCentred           ? 2
                                                                 : Team::kResident)
    row_losses(const SoftmaxKl a, const Plan plan) {
  using Real = real_t<Student>;
  constexpr int kWidest = sizeof(Student) > sizeof(Taught) ? sizeof(Student) : sizeof(Taught), kCount = 16 / kWidest;
  using StudentRow = Row<Team, Student, kCount>;
  using TeacherRow = Row<Team, Taught, kCount>;
  extern __shared__ uint4 shared[];
  const Team team(plan.cluster);
  auto* teachers = reinterpret_cast<Teacher<Real>*>(shared) + Team::index_in_block() * a.num_teachers;  // [K]
  auto* kept = reinterpret_cast<char*>(shared) + plan.teacher_bytes;
  const Temperature<Real> of_student(a.student_temperature), of_teacher(a.teacher_temperature);
  const bool keep = Team::kKeeps && plan.keep, divergence = kCentred || a.loss == RowLoss::kl;
  const bool same_temperature = plan.same_temperature, jsd = a.loss == RowLoss::jsd;
  const Real beta = a.beta, rest = 1 - a.beta;
  const int pack_count = plan.chunks * Team::kThreads, num_teachers = a.num_teachers;
  auto* kept_student = reinterpret_cast<Pack<Student, kCount>*>(kept);
  auto* kept_teachers = reinterpret_cast<Pack<Taught, kCount>*>(kept_student + pack_count);

  for (int64_t r = team.index(); r < a.num_rows; r += team.count()) {
    const int64_t given = a.num_classes ? a.num_classes[r] : a.num_columns;
    const bool valid = given >= 1 && given <= a.num_columns;
    const Share share = {team.block_in_cluster() * plan.chunks * Team::kThreads * kCount, plan.chunks,
                         int(a.num_columns), int(valid ? given : a.num_columns), plan.aligned};
    const StudentRow student = {static_cast<const Student*>(a.student) + r * a.student_stride, kept_student, keep,
                                a.student_dtype};
    const auto teacher_row = [&](int k) {
      return TeacherRow{static_cast<const Taught*>(a.teacher) + k * a.teacher_stride + r * a.teacher_row_stride,
                        kept_teachers + k * pack_count, keep && divergence, a.teacher_dtype};
    };

    student.fetch(share);
    __pipeline_commit();
    for (int k = 0; divergence && k < num_teachers; ++k) teacher_row(k).fetch(share);
    __pipeline_commit();
    __pipeline_wait_prior(1);  // the student is there
    const auto s = normalize<Team, StudentRow, kCount>(team, student, share, of_student, a.loss == RowLoss::entropy);
    __pipeline_wait_prior(0);  // the teachers too
    Real loss = a.loss == RowLoss::entropy ? s.entropy : Real(0), total_weight = 0;
    for (int k = 0; k < num_teachers; ++k) {
      const TeacherRow row = teacher_row(k);
      Teacher<Real> t = {};
      t.weight = a.teacher_weights ? static_cast<const Real*>(a.teacher_weights)[k * a.num_rows + r]
                                   : Real(1) / a.num_teachers;
      if (divergence) {
        const auto n = normalize<Team, TeacherRow, kCount>(team, row, share, of_teacher, false);
        t.max = n.max, t.inverse_sum = n.inverse_sum, t.max_gap = n.max - s.max, t.log_sum_gap = n.log_sum - s.log_sum;
      } else {
        t.target = argmax<Team, TeacherRow, kCount, Real>(team, row, share);
        loss += t.weight * (s.log_sum - (student.at(t.target) - s.max) * of_student.inverse);
      }
      total_weight += t.weight;
      if (Team::rank() == 0) teachers[k] = t;
    }
    team.wait();  // for teachers[]

    const Real given_scale = a.grad ? static_cast<const Real*>(a.row_scale)[r] : Real(0);
    const Gradient<Team, Student, kCount> gradient = {static_cast<Student*>(a.grad) + r * a.num_columns,
                                                      valid ? given_scale * of_student.inverse : Real(NAN),
                                                      a.student_dtype, plan.aligned_grad};
    const auto read_student = [&](int chunk, Real* x, Real* q) {
      student.widen(share, chunk, student.read(share, chunk), x);
#pragma unroll
      for (int k = 0; k < kCount; ++k) q[k] = of_student.exp(x[k] - s.max) * s.inverse_sum;
    };
    // Calls use(k, weight, p, log p - log q) with a chunk's numbers k of every teacher.
    const auto read_teachers = [&](int chunk, const Real* x, const auto& use) {
#pragma unroll 1
      for (int teacher = 0; teacher < num_teachers; ++teacher) {
        const Teacher<Real> t = teachers[teacher];
        const TeacherRow row = teacher_row(teacher);
        Real y[kCount];
        row.widen(share, chunk, row.read(share, chunk), y);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const Real p = of_teacher.exp(y[k] - t.max) * t.inverse_sum;
          // y - x is exact where they are close, which (y - max) - (x - max) is not.
          const Real gap = same_temperature ? ((y[k] - x[k]) - t.max_gap) * of_teacher.inverse
                                            : (y[k] - t.max) * of_teacher.inverse - (x[k] - s.max) * of_student.inverse;
          use(k, t.weight, p, gap - t.log_sum_gap);
        }
      }
    };

    Real terms = 0;
    if constexpr (kCentred) {
      const auto term_of = [&](Real p, Real q, Real d) {
        return jsd ? jsd_term<Real>(p, q, d, beta, rest) : reverse_kl_term<Real>(p, q, d);
      };
      Real mean = 0;
#pragma unroll 1
      for (int chunk = 0; chunk < share.chunks; ++chunk) {
        Real x[kCount], q[kCount];
        read_student(chunk, x, q);
        read_teachers(chunk, x, [&](int k, Real weight, Real p, Real d) {
          const DivergenceTerm<Real> term = term_of(p, q[k], d);
          terms += weight * term.loss;
          mean += q[k] == 0 ? Real(0) : weight * q[k] * term.by_q;
        });
      }
      loss = team.sum(terms), mean = team.sum(mean);
#pragma unroll 1
      for (int chunk = 0; a.grad && chunk < share.chunks; ++chunk) {
        Real x[kCount], q[kCount], slope[kCount] = {};
        read_student(chunk, x, q);
        read_teachers(chunk, x,
                      [&](int k, Real weight, Real p, Real d) { slope[k] += weight * term_of(p, q[k], d).by_q; });
#pragma unroll
        for (int k = 0; k < kCount; ++k) slope[k] = q[k] == 0 ? Real(0) : q[k] * (slope[k] - mean);
        gradient.write(share, chunk, slope);
      }
    } else if (a.grad || divergence) {
#pragma unroll 1
      for (int chunk = 0; chunk < share.chunks; ++chunk) {
        Real x[kCount], q[kCount], slope[kCount];
        read_student(chunk, x, q);
        if (divergence) {
#pragma unroll
          for (int k = 0; k < kCount; ++k) slope[k] = 0;
          read_teachers(chunk, x, [&](int k, Real weight, Real p, Real d) {
            const KlTerm<Real> term = kl_term<Real>(p, q[k], d, exp_remainder(d));
            terms += weight * term.loss;
            slope[k] += weight * term.slope;
          });
        } else if (a.loss == RowLoss::entropy) {
#pragma unroll
          for (int k = 0; k < kCount; ++k)
            slope[k] = q[k] == 0 ? Real(0) : -q[k] * ((x[k] - s.max) * of_student.inverse + (s.entropy - s.log_sum));
        } else {
          const Place<Team, kCount> at(share, chunk);
#pragma unroll
          for (int k = 0; k < kCount; ++k) slope[k] = q[k] * total_weight;
          for (int teacher = 0; teacher < num_teachers; ++teacher) {
            const int target = teachers[teacher].target;
#pragma unroll
            for (int k = 0; k < kCount; ++k) slope[k] -= at[k] == target ? teachers[teacher].weight : Real(0);
          }
        }
        if (a.grad) gradient.write(share, chunk, slope);
      }
      if (divergence) loss = team.sum(terms);
    }
    team.wait();  // teachers[] is free again
    if (Team::rank() == 0 && team.block_in_cluster() == 0) static_cast<Real*>(a.losses)[r] = valid ? loss : Real(NAN);
  }
}

using Kernel = void (*)(SoftmaxKl, Plan);

template <class Team, bool kCentred>
Kernel kernel_for(int student_bytes, int teacher_bytes) {
  if (student_bytes == 8) return row_losses<Team, double, double, kCentred>;
  if (student_bytes == 4)
    return teacher_bytes == 4 ? row_losses<Team, float, float, kCentred> : row_losses<Team, float, uint16_t, kCentred>;
  return teacher_bytes == 4 ? row_losses<Team, uint16_t, float, kCentred>
                            : row_losses<Team, uint16_t, uint16_t, kCentred>;
}

template <class Team>
Kernel kernel_for(RowLoss loss, int student_bytes, int teacher_bytes) {
  return is_centred(loss) ? kernel_for<Team, true>(student_bytes, teacher_bytes)
                          : kernel_for<Team, false>(student_bytes, teacher_bytes);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kShortRow = 1024;            // the longest row that one warp takes
constexpr int64_t kShareBytes = 72 << 10;  // three blocks then fit on a multiprocessor with 228 KB of shared memory
constexpr int64_t kStaticBytes = 2 << 10;  // upper bound of what reductions use, beside the launch's own bytes

}  // namespace

cudaError_t softmax_kl(const SoftmaxKl& a, cudaStream_t stream) {
  int device, shared_limit, generation;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (error) return error;

  const int student_bytes = bytes_of(a.student_dtype);
  const int teacher_bytes = a.num_teachers ? bytes_of(a.teacher_dtype) : student_bytes;
  const int count = 16 / (student_bytes > teacher_bytes ? student_bytes : teacher_bytes);
  // Nothing that decides the order of sums depends on the gradient: a loss is the same to the bit with one and without.
  const bool divergence = is_divergence(a.loss), short_rows = a.num_columns <= kShortRow;
  const int64_t column_bytes =
      student_bytes + (divergence ? a.num_teachers * teacher_bytes : 0);  // kept between the passes
  const int64_t one_teacher = student_bytes == 8 ? sizeof(Teacher<double>) : sizeof(Teacher<float>);

  Plan plan = {1};
  plan.teacher_bytes = divide_up(a.num_teachers * one_teacher * (short_rows ? kWarps : 1), 16) * 16;
  plan.aligned = a.num_columns % count == 0 && on_16_bytes(a.student, a.student_stride * student_bytes) &&
                 on_16_bytes(a.teacher, a.teacher_stride * teacher_bytes) &&
                 on_16_bytes(a.teacher, a.teacher_row_stride * teacher_bytes);
  plan.same_temperature = a.student_temperature == a.teacher_temperature;
  plan.aligned_grad = plan.aligned && on_16_bytes(a.grad, a.num_columns * student_bytes);
  int64_t shared_bytes = plan.teacher_bytes, work = divide_up(a.num_rows, kWarps);
  Kernel kernel = kernel_for<WarpTeam>(a.loss, student_bytes, teacher_bytes);
  plan.chunks = divide_up(a.num_columns, kWarp * count);
  if (!short_rows) {
    const int64_t chunks = divide_up(a.num_columns, kThreads * count), chunk_bytes = kThreads * count * column_bytes;
    const int widest = generation >= 9 ? 8 : 1;
    while (plan.cluster < widest && divide_up(chunks, plan.cluster) * chunk_bytes > kShareBytes) plan.cluster *= 2;
    plan.chunks = divide_up(chunks, plan.cluster);
    const bool two_passes = a.grad || divergence;
    plan.keep = two_passes && shared_bytes + plan.chunks * chunk_bytes + kStaticBytes <= shared_limit;
    if (plan.keep) shared_bytes += plan.chunks * chunk_bytes;
    work = a.num_rows;
    kernel = kernel_for<BlockTeam>(a.loss, student_bytes, teacher_bytes);
  }

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.cluster;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error) return error;
  if (plan.cluster > 1) {
    // Its blocks lie in one part of the device, so fewer clusters run at once than multiprocessors have room for, and one
    // more than that would begin when all others have ended.
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    const int64_t teams = clusters < a.num_rows ? clusters : a.num_rows;
    config.gridDim = plan.cluster * unsigned(teams > 0 ? teams : 1);
  } else {
    int64_t blocks = 0;
    error = resident_blocks(kernel, kThreads, shared_bytes, work, &blocks);
    config.gridDim = blocks;
  }
  return error ? error : cudaLaunchKernelEx(&config, kernel, a, plan);
}

}  // namespace samerge::gpu
