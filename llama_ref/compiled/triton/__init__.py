"""Triton kernels for CUDA, and a check whether a device runs them."""
