"""Plain torch: the reference on the CPU."""
