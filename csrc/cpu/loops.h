// Included once by every level_*.cpp, which sets SAMERGE_LEVEL, the width of its vectors and the instructions to compile
// for. No standard header with inline functions is included below: the linker keeps one copy of such a function, and it
// must not be one that was compiled for instructions this machine lacks.
#include "coefficient_grad_loops.h"
#include "drop_loops.h"
#include "elected_sum_loops.h"
#include "gram_product_loops.h"
#include "lanczos_loops.h"
#include "levels.h"
#include "magnitudes_loops.h"
#include "moments_loops.h"
#include "row_products_loops.h"
#include "softmax_kl_loops.h"
#include "weighted_sum_loops.h"

#define SAMERGE_CONCAT_(a, b) a##b
#define SAMERGE_CONCAT(a, b) SAMERGE_CONCAT_(a, b)

namespace samerge {

const Loops SAMERGE_CONCAT(SAMERGE_LEVEL, _loops) = {
    SAMERGE_LEVEL::weighted_sum, SAMERGE_LEVEL::coefficient_grad,      SAMERGE_LEVEL::softmax_kl,
    SAMERGE_LEVEL::moments,      SAMERGE_LEVEL::gram_product,          SAMERGE_LEVEL::orthogonalise,
    SAMERGE_LEVEL::elected_sum,  SAMERGE_LEVEL::count_digits,          SAMERGE_LEVEL::trim,
    SAMERGE_LEVEL::drop,         SAMERGE_LEVEL::rows_times_transposed, SAMERGE_LEVEL::add_rows_times};

}  // namespace samerge
