"""Benchmarks of the CUDA kernels on a GPU, with other implementations of the same step."""
