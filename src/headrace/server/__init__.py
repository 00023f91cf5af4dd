"""HTTP: the engine behind the APIs people already use."""
