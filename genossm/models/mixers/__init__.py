"""Sequence mixers, one file each: (batch, length, width) to the same shape."""
