"""Triton kernels, one file per operator; installed as samerge_ext.kernels.

The steps of block Lanczos (csrc/cuda/lanczos.cu) have none: their threads hand numbers on through memory within a program, where
a block of vectors of any width is factored column by column, and Triton promises no order between one thread's store and
another's load. In tiles, the width would have to be a power of two, and fp64 needs pairs of numbers in every sum. On this
backend, for machines without a CUDA toolkit, `samerge_ext.ops.krylov` composes the steps of gram_product and torch's operators.
"""
