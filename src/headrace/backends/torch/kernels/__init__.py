"""Triton kernels: what `ops.py` means, on a GPU. One file an operation; none is imported on a CPU."""
