"""SIGTERM as a wish: the work in hand is finished first. A batch system sends it before it kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from genossm.progress import say

STOPPED_STATUS = 143
"""Exit status of a command that SIGTERM stopped: 128 + 15, what a shell tells of a process it killed."""


@contextmanager
def stop_on_sigterm(what: str) -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM is noted and does nothing else; yields whether one came.

    Only the main thread of a process can see to signals; elsewhere SIGTERM does what it did before.

    Args:
        what: is finished first, for the message: "the part in hand".
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        if not asked.is_set():  # a batch system may well send it twice
            asked.set()
            say(f"SIGTERM: finishing {what}, then stopping")

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
