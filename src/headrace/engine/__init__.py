"""The loop that turns plans into tokens, and the ways into it."""
