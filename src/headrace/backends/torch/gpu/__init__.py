"""The torch backend on an NVIDIA GPU: two plans in flight, decode steps as CUDA graphs."""
