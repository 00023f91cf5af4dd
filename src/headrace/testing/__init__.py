"""For tests and plug-ins: a backend computed by hand, tiny checkpoints, the conformance suite."""
