"""Writing HDF5: a full disk is an error that says so, in a process that lives on."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from genossm.hdf5_file import create_hdf5

# A limit on the size of a file stands in for the full disk: no mount and no root needed. It runs in a process
# of its own, because without create_hdf5 HDF5 ends the process.
SCRIPT = """
import resource, signal, sys
import numpy as np
from genossm.hdf5_file import create_hdf5
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
values = np.random.default_rng(0).random((64, 1000))
try:
    with create_hdf5(sys.argv[1]) as (file, flush):
        for number in range(20):
            file.create_dataset(f"group{number}/values", data=values, chunks=(64, 100))
            if sys.argv[3] == "flush":
                flush()
except OSError as error:
    print(error.errno, number)
else:
    print("written", number)
"""


@pytest.mark.parametrize("flush", ["flush", "wait"])
@pytest.mark.parametrize("limit", [100, 5_000, 2_000_000, 10_250_000])
def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, limit: int, flush: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "full.h5"), str(limit), flush]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    number, last = done.stdout.split()
    assert int(number) == errno.EFBIG
    if flush == "flush" and limit < 10_000_000:
        assert int(last) == max(0, limit // 512_000)  # found at the first write that failed, not at the end


def test_the_file_is_an_ordinary_hdf5_file(tmp_path: Path) -> None:
    values = np.arange(60_000, dtype=np.float32).reshape(20_000, 3)
    with create_hdf5(tmp_path / "a.h5") as (file, flush):
        file.attrs["bin_bp"] = 32
        dataset = file.create_dataset(
            "c/targets", shape=values.shape, dtype="f4", chunks=(512, 3), compression="lzf"
        )
        dataset[:10_000] = values[:10_000]
        flush()
        dataset[10_000:] = values[10_000:]
        assert np.array_equal(dataset[:], values)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["bin_bp"] == 32
        assert np.array_equal(file["c/targets"][:], values)


def test_an_error_of_the_caller_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), create_hdf5(tmp_path / "a.h5") as (file, _):
        file["x"] = 1
        raise KeyError("mine")
