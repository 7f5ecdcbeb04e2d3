"""Work spread over processes: tasks go out one by one, results and progress come back as they are there.

The processes are fresh ones that import neither the program that started them (a script needs no
`if __name__ == "__main__"`) nor share its files. They end with it, even when it is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from genossm.errors import GenossmError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
_Message = tuple[str, int, Any]

MOST_JOBS = 8
"""Processes that are started where nobody asked for a number."""


def usual_jobs() -> int:
    """As many processes as this one may use cores, but at most `MOST_JOBS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_JOBS)


def in_processes(
    work: Callable[[Task, Advance], Result], tasks: Iterable[Task], *, jobs: int, advance: Advance
) -> Iterator[tuple[int, Result]]:
    """Yield (task number, `work(task, advance)`) of every task, in the order in which they end.

    Args:
        work: a function of a module, called in the processes; what it hands to its second argument
            arrives at `advance`.
        tasks: each is made when a process is free for it, and pickled.
        jobs: how many processes, at least 1.
        advance: called in this process with the progress of any task.

    Raises:
        GenossmError: a process was killed, most often for want of memory.
        Exception: what `work` raised first; the other processes are then ended.
    """
    messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()
    numbered, taking = enumerate(tasks), threading.Lock()
    processes = [_start() for _ in range(jobs)]

    def take() -> tuple[int, Task] | None:
        with taking:
            return next(numbered, None)

    threads = [
        threading.Thread(target=_drive, args=(process, work, take, messages), daemon=True)
        for process in processes
    ]
    for thread in threads:
        thread.start()
    try:
        working = jobs
        while working:
            kind, number, content = messages.get()
            if kind == "advance":
                advance(content)
            elif kind == "result":
                yield number, content
            elif kind == "failed":
                raise content
            else:
                working -= 1
    finally:
        for process in processes:
            process.terminate()
        for thread in threads:
            thread.join()


def serve() -> None:
    """What one of the processes does: tasks from standard input until it closes, messages to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get among the messages
    try:
        while True:
            work, task = pickle.load(source)
            try:
                result = work(task, lambda amount: _send(sink, "advance", amount))
            except BrokenPipeError:
                raise
            except BaseException as error:
                _send(sink, "failed", _portable(error))
            else:
                _send(sink, "result", result)
    except EOFError:  # no task any more
        return
    except BrokenPipeError:  # nobody is there any more
        os._exit(1)  # without Python's own attempt to flush


def _start() -> subprocess.Popen[bytes]:
    paths = [str(path) for path in sys.path]
    code = f"import sys; sys.path[:] = {paths!r}; from {__name__} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )


def _drive(
    process: subprocess.Popen[bytes],
    work: Callable[..., Any],
    take: Callable[[], tuple[int, Any] | None],
    messages: queue.SimpleQueue[_Message],
) -> None:
    """Hand tasks to one process and pass its messages on, until there is no task or it failed."""
    number = -1
    assert process.stdin is not None and process.stdout is not None
    try:
        while (taken := take()) is not None:
            number, task = taken
            pickle.dump((work, task), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            kind = "advance"
            while kind == "advance":
                kind, content = pickle.load(process.stdout)
                messages.put((kind, number, content))
            if kind == "failed":
                break
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        messages.put(("failed", number, _killed(process.wait())))
    except BaseException as error:  # such as one of making the task
        messages.put(("failed", number, error))
    finally:
        try:
            process.stdin.close()
        except BrokenPipeError:  # it was killed, which was said above
            process.kill()
        process.stdout.close()
        process.wait()
        messages.put(("idle", number, None))


def _send(sink: BinaryIO, kind: str, content: Any) -> None:
    pickle.dump((kind, content), sink, pickle.HIGHEST_PROTOCOL)
    sink.flush()


def _portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note, or one that says the same where it cannot be pickled."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


def _killed(status: int) -> GenossmError:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return GenossmError(
        f"a process at work {how}, most often because the memory was full: use fewer processes (--jobs 1), or a "
        "machine with more memory; what is finished is kept"
    )
