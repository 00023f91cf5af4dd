"""Packed weights on the device: one file a form."""
