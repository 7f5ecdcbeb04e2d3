"""A lock among processes: one holds it, the others wait, and a killed one lets go."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import genossm.lock as module
from genossm.lock import only_one

HOLDER = """
import sys, time
from pathlib import Path
from genossm.lock import only_one
with only_one(Path(sys.argv[1])) as alone:
    print(alone, flush=True)
    time.sleep(60)
"""


def test_it_is_held_until_the_holder_is_killed(tmp_path: Path) -> None:
    path, told, entered = tmp_path / "lock", threading.Event(), threading.Event()

    def wait() -> None:
        with only_one(path, waiting=told.set):
            entered.set()

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        thread = threading.Thread(target=wait)
        thread.start()
        assert told.wait(20)
        assert not entered.wait(0.2)
        holder.send_signal(signal.SIGKILL)
    thread.join(20)
    assert entered.is_set()
    assert list(tmp_path.iterdir()) == []


# Each adds one to a number in a file, slowly: without the lock numbers would be lost.
COUNTER = """
import sys, time
from pathlib import Path
from genossm.lock import only_one
folder = Path(sys.argv[1])
for _ in range(5):
    with only_one(folder / "lock"):
        number = int((folder / "number").read_text())
        time.sleep(0.002)
        (folder / "number").write_text(str(number + 1))
"""


def test_ten_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(10)]
    assert [process.wait(60) for process in processes] == [0] * 10
    assert (tmp_path / "number").read_text() == "50"
    assert not (tmp_path / "lock").exists()


def test_where_locks_do_not_work_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_one(tmp_path / "absent" / "lock") as alone:
        assert not alone
    monkeypatch.setattr(module, "_flock", None)
    with only_one(tmp_path / "lock") as alone:
        assert not alone
    assert list(tmp_path.iterdir()) == []


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), only_one(tmp_path / "lock"):
        raise KeyError("mine")
    with only_one(tmp_path / "lock", waiting=lambda: pytest.fail("it is still held")) as alone:
        assert alone
