// The tensor wrappers as one unit: to read ATen's headers takes the compiler three times as long as a wrapper.
#include "coefficient_grad_cpu.cpp"
#include "elected_sum_cpu.cpp"
#include "gram_product_cpu.cpp"
#include "lanczos_cpu.cpp"
#include "magnitudes_cpu.cpp"
#include "moments_cpu.cpp"
#include "softmax_kl_cpu.cpp"
#include "weighted_sum_cpu.cpp"
