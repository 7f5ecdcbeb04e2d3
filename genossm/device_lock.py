"""One thread at a time asks a CUDA device for memory: while a graph is recorded, no other thread may do so."""

import threading

DEVICE_LOCK = threading.RLock()
"""Held by the loader's thread while it puts a batch on the device; hold it to record a CUDA graph."""
