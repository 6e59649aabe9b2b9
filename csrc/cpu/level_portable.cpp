#define SAMERGE_LEVEL portable
#define SAMERGE_VECTOR_BYTES 16
#include "loops.h"
