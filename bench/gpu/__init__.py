"""The CUDA kernels, timed on a GPU beside other ways to make the same step."""
