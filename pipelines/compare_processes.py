"""The processes of a comparison: command lines on a leash, so that none outlives the comparison that started it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from genossm.errors import CheckpointError
from genossm.progress import say

LOCK_FILE = ".lock"
PATIENCE_S = 60.0
# A command line that ends by SIGTERM when its standard input closes, as it does even when the comparison is killed.
# os.read, because a buffered read would hold a lock that Python wants at its own end.
LEASHED = """\
import os, signal, sys, threading
def leash():
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=leash, daemon=True).start()
from genossm.cli import main
sys.exit(main())
"""


class CommandError(Exception):
    """A command failed; the message is its own sentence."""


class Commands:
    """Runs genossm commands as processes, from any thread, and ends them all when it is closed.

    Args:
        threads: OpenMP threads of a process, where $OMP_NUM_THREADS is not set.
        lock: open file that the processes hold open, too.
    """

    def __init__(self, *, threads: int, lock: int) -> None:
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self._lock = lock
        self._running: set[subprocess.Popen[str]] = set()
        self._closed = threading.Event()

    def run(self, words: Sequence[str], log: Path) -> None:
        """Run `genossm WORDS`; its standard error is added to the file `log`.

        Raises:
            CommandError: it failed, or everything was closed.
        """
        if self._closed.is_set():
            raise CommandError("stopped")
        with log.open("ab") as messages:
            process = subprocess.Popen(
                [sys.executable, "-c", LEASHED, "--json", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=self._environment,
                pass_fds=(self._lock,),
                text=True,
            )
        with process:
            self._running.add(process)
            if self._closed.is_set():
                self._let_go(process)
            assert process.stdout is not None
            answer = process.stdout.read()
            status = process.wait()
            self._running.discard(process)
        if status:
            raise CommandError(_sentence(answer, status, log))

    def close(self) -> None:
        """End what runs; nothing can be started any more."""
        self._closed.set()
        for process in list(self._running):
            self._let_go(process)

    @staticmethod
    def _let_go(process: subprocess.Popen[str]) -> None:
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def alone_in(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[int]:
    """Yield an open file that says that `folder` is in use, by this process and those that it hands the file to.

    Raises:
        CheckpointError: another comparison, or a training that it started, is still at work there.
    """
    with (folder / LOCK_FILE).open("w") as file:
        end, told = time.monotonic() + patience_s, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"another comparison is at work in {folder}; wait for its end, or choose another folder"
                    ) from error
            if not told:
                say(f"waiting for another comparison in {folder} to end")
                told = True
            time.sleep(0.5)
        yield file.fileno()


def _sentence(answer: str, status: int, log: Path) -> str:
    """What a failed command said: its error as JSON, or the last line of its log."""
    try:
        message = json.loads(answer.splitlines()[-1])["error"]["message"]
        return str(message)
    except (IndexError, ValueError, KeyError, TypeError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{how}; the last line of {log} is: {last}"
