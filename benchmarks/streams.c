/* The plainest loops over several streams of memory: what an operator that moves as many bytes could reach at best.
   Each works on whole chunks of one thread's share; a chunk of sums stays in the first-level cache. */
#include <stdint.h>

enum { CHUNK = 1024 };

static void add_chunk(const float* stack, int64_t streams, int64_t stride, const float* vector, int64_t i, float* sum) {
  for (int k = 0; k < CHUNK; ++k) sum[k] = vector[i + k];
  for (int64_t s = 0; s < streams; ++s) {
    const float* row = stack + s * stride + i;
    for (int k = 0; k < CHUNK; ++k) sum[k] += row[k];
  }
}

/* out[i] = vector[i] + sum over s of stack[s][i], first <= i < last */
void read_and_write(const float* stack, int64_t streams, int64_t stride, const float* vector, float* out, int64_t first,
                    int64_t last) {
  float sum[CHUNK];
  for (int64_t i = first; i + CHUNK <= last; i += CHUNK) {
    add_chunk(stack, streams, stride, vector, i, sum);
    for (int k = 0; k < CHUNK; ++k) out[i + k] = sum[k];
  }
}

/* The same without writing: out[first / CHUNK] gets a number that depends on all that was read. */
void read_only(const float* stack, int64_t streams, int64_t stride, const float* vector, float* out, int64_t first,
               int64_t last) {
  float sum[CHUNK], total[CHUNK] = {0};
  for (int64_t i = first; i + CHUNK <= last; i += CHUNK) {
    add_chunk(stack, streams, stride, vector, i, sum);
    for (int k = 0; k < CHUNK; ++k) total[k] += sum[k];
  }
  for (int k = 1; k < CHUNK; ++k) total[0] += total[k];
  out[first / CHUNK] = total[0];
}
