"""Triton kernels, one file per operator; installed as samerge_ext.kernels."""
