#include "levels.h"

#ifdef SAMERGE_X86_LEVELS
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define SAMERGE_LEVEL avx2
#define SAMERGE_VECTOR_BYTES 32
#include "loops.h"
#endif
