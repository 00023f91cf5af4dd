"""The fast path on a CPU: our own kernels, no torch."""
