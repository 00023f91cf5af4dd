"""The same requests under every method, with proof that the answers are the same."""
