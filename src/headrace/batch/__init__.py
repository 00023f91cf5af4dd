"""Durable offline batches: a file of OpenAI batch lines in, a file of answers out, whatever is killed in between."""
