"""Ranks and how they talk."""
