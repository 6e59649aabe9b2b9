// Numbers of base + matrix, widened one at a time where they lie: dtypes are known at run time only, at one uniform
// branch.
#pragma once

#include "device.cuh"

namespace samerge::gpu {

template <class Real>
__device__ __forceinline__ Real number_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

template <class Real>
struct MatrixSource {
  const void *matrix, *base;
  int64_t matrix_stride, base_stride;
  DType matrix_dtype, base_dtype;

  template <class Call>
  __device__ MatrixSource(const Call& a, const Addresses& at, int i)
      : matrix(at.matrices[i]),
        base(a.bases ? at.bases[i] : nullptr),
        matrix_stride(a.matrix_stride),
        base_stride(a.base_stride),
        matrix_dtype(a.matrix_dtype),
        base_dtype(a.base_dtype) {}

  __device__ __forceinline__ Real operator()(int64_t row, int64_t column) const {
    Real x = number_at<Real>(matrix, matrix_dtype, row * matrix_stride + column);
    if (base) x += number_at<Real>(base, base_dtype, row * base_stride + column);
    return x;
  }
};

}  // namespace samerge::gpu
