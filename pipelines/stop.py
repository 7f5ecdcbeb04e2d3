"""Signals as a wish: the work in hand is finished first. A batch system sends SIGTERM before it kills."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from genossm.progress import say

STOPPED_STATUS = 143
"""Exit status of a command that SIGTERM stopped: 128 + 15, what a shell tells of a process it killed."""


@contextmanager
def stop_asked(
    what: str, numbers: tuple[signal.Signals, ...] = (signal.SIGTERM,)
) -> Iterator[Callable[[], bool]]:
    """Within, these signals are noted and do nothing else; yields whether one came.

    A SIGINT after another signal raises KeyboardInterrupt all the same: whoever presses Ctrl+C twice does not want to wait.
    Only the main thread of a process can see to signals; elsewhere they do what they did before.

    Args:
        what: is finished first, for the message: "the part in hand".
        numbers: the signals.
    """
    asked, owner = threading.Event(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process: it is told to end when this one does
            return
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked.is_set():  # a batch system may well send it twice
            asked.set()
            with suppress(RuntimeError):  # it came while something was being printed
                say(f"{signal.Signals(number).name}: finishing {what}, then stopping")

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
