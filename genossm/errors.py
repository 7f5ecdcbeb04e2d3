"""Errors that a user can mend: each message is one sentence that says what, the value, what is allowed, what to do."""

from __future__ import annotations


class GenossmError(Exception):
    """Base of every error that the command line prints as one sentence (exit status 1)."""


class DataError(GenossmError, ValueError):
    """The data say something impossible: names, lengths, coordinates, empty or contradictory files."""


class ConfigError(GenossmError, ValueError):
    """A configuration has an unknown key, a wrong type or an impossible value."""


class FileError(GenossmError, OSError):
    """A file is missing, unreadable, truncated or cannot be written."""


class CheckpointError(GenossmError, ValueError):
    """A run folder is incomplete, of another version, or does not fit what it is used with."""


class TrainingError(GenossmError, ArithmeticError):
    """A training ended before its time: it diverged, ran out of memory, or was stopped by a signal."""


class DeviceError(GenossmError, RuntimeError):
    """The compute device that was asked for is not there."""
