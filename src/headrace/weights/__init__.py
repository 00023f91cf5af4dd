"""Checkpoints as a stream of named tensors. numpy only, memory-mapped, no pickle."""
