"""Where a model's time goes: a short fixed workload, its named ranges, a table and a trace of them."""
