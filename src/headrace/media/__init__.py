"""Pictures: from a URL to bytes, from bytes to square tiles, and what stands for them in a prompt."""
