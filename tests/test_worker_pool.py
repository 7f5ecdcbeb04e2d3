"""Work in processes: all results, progress, errors as they are, and no process that outlives its parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from genossm.errors import DataError, GenossmError
from genossm.pipelines.worker_pool import in_processes

# A module that the processes can import; pytest's own test modules have no name for them.
TASKS = """
import os, signal, sys, time
from genossm.errors import DataError

def square(number, advance):
    print("noise on standard output")
    advance(number)
    return number * number, os.getpid()

def fail(number, advance):
    if number == 1:
        raise DataError("number 1 is refused")
    if number == 2:
        raise OSError(28, "No space left on device")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        class Local(Exception):
            pass
        raise Local("cannot be pickled")
    time.sleep(0.2)
    return number

def report(folder, advance):
    (folder / str(os.getpid())).touch()
    for _ in range(600):
        time.sleep(0.05)
        advance(1)
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "pool_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    import pool_tasks  # type: ignore[import-not-found]

    yield pool_tasks
    del sys.modules["pool_tasks"]


def test_every_task_is_done_once_and_reports(tasks: ModuleType) -> None:
    steps: list[int] = []
    found = dict(in_processes(tasks.square, range(9), jobs=3, advance=steps.append))
    assert {number: result for number, (result, _) in found.items()} == {n: n * n for n in range(9)}
    workers = {process for _, process in found.values()}
    assert 1 <= len(workers) <= 3 and os.getpid() not in workers
    assert sorted(steps) == list(range(9))
    assert list(in_processes(tasks.square, (), jobs=2, advance=steps.append)) == []


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (1, DataError, "number 1 is refused"),
        (2, OSError, "No space left on device"),
        (3, GenossmError, r"a process at work was ended by signal 9, .* use fewer processes \(--jobs 1\)"),
        (4, RuntimeError, "cannot be pickled"),
    ],
)
def test_an_error_of_a_task_ends_all(
    tasks: ModuleType, number: int, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        list(in_processes(tasks.fail, [5, number, *range(10, 500)], jobs=2, advance=lambda _: None))
    if number == 2:
        assert isinstance(caught.value, OSError) and caught.value.errno == errno.ENOSPC
    if number in (1, 2):
        assert "pool_tasks.py" in "".join(caught.value.__notes__)


def test_an_error_of_making_a_task_is_raised(tasks: ModuleType) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise DataError("no second one")

    with pytest.raises(DataError, match="no second one"):
        list(in_processes(tasks.square, numbers(), jobs=1, advance=lambda _: None))


# A script without a guard, as people write them: the processes must not run it again.
SCRIPT = """
import sys
from pathlib import Path
from genossm.pipelines.worker_pool import in_processes
import pool_tasks
print("started", flush=True)
list(in_processes(pool_tasks.report, [Path(sys.argv[1])] * 2, jobs=2, advance=lambda _: None))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_processes_end_with_their_parent(tasks: ModuleType, tmp_path: Path, how: signal.Signals) -> None:
    script, alive = tmp_path / "script.py", tmp_path / "alive"
    script.write_text(SCRIPT)
    alive.mkdir()
    command = [sys.executable, str(script), str(alive)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        deadline = time.monotonic() + 30
        while len(list(alive.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.send_signal(how)
        printed, _ = parent.communicate(timeout=30)
    assert printed == "started\n"
    for path in alive.iterdir():
        while _runs(int(path.name)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _runs(process: int) -> bool:
    try:
        return not Path(f"/proc/{process}/stat").read_text().split(") ")[1].startswith("Z")
    except OSError:
        return False
