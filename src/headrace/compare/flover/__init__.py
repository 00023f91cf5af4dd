"""Flover's experiments (temporal fusion, HiPC 2023): memory shuffle, iteration clock, published tables, ours beside."""
