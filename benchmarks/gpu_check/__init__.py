"""What a GPU must show: kernels right and fast, models equal, speeds beside the hardware's limit. See `__main__`."""
