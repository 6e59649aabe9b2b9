#include "levels.h"

#ifdef SAMERGE_X86_LEVELS
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define SAMERGE_LEVEL avx512
#define SAMERGE_VECTOR_BYTES 64
#include "loops.h"
#endif
