"""Backends execute plans. None imports another, nor the scheduler."""
