"""Compiled update kernels: native CPU and CUDA libraries, and Triton. Optimizers call dispatch."""
