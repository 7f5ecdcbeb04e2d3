"""`prepare` when things go wrong: killed, disk full, damaged files, a crowd at once, inputs that changed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

import genossm.pipelines.prepare_work as work
from genossm.dataset import PreparedDataset
from genossm.dataset_config import load_dataset_config
from genossm.dataset_inputs import open_inputs
from genossm.errors import DataError, FileError
from genossm.pipelines.prepare import prepare


def content(folder: Path) -> dict[str, object]:
    """Everything in a prepared folder, but for when it was made and where."""
    record = json.loads((folder / "dataset.json").read_text())
    del record["provenance"]["made"], record["genome"]["relative_path"]
    files = {name: (folder / name).read_bytes() for name in ("targets.h5", "windows.tsv")}
    return {"dataset.json": record, **files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# As if the machine were slow: stops before one of the steps, after some tracks or bins, until it is killed.
SLOW = """
import sys, time
import genossm.pipelines.prepare_columns as columns
import genossm.pipelines.prepare_targets as targets
import genossm.pipelines.prepare_work as work
from genossm.pipelines.prepare import prepare

def stopping(function, calls):
    def call(*arguments):
        calls.append(1)
        if len(calls) == 2:
            print("stopped", flush=True)
            time.sleep(60)
        return function(*arguments)
    return call

step = sys.argv[3]
if step == "convert":
    work.convert_column = stopping(work.convert_column, [])
elif step == "store":
    columns._Converter._store = stopping(columns._Converter._store, [])
elif step == "write":
    targets._write_mask = stopping(targets._write_mask, [])
elif step == "describe":
    work._size_and_hash = stopping(work._size_and_hash, [])
prepare(sys.argv[1], sys.argv[2], force=True)
"""


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
@pytest.mark.parametrize(("step", "there"), [("convert", 1), ("store", 0), ("write", 2), ("describe", 2)])
def test_killed_it_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, there: int, again: bool
) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    expected = content(prepare(source, tmp_path / "undisturbed").folder)
    if again:
        prepare(source, out)
    command = [sys.executable, "-c", SLOW, str(source), str(out), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
    assert ".out.preparing" in names(tmp_path)
    assert out.exists() == again
    if again:
        assert content(out) == expected
    capsys.readouterr()
    prepare(source, out)
    said = capsys.readouterr().err
    assert (f"{there} of 2 tracks are there from an earlier attempt" in said) == (there > 0 and not again)
    assert content(out) == expected
    assert names(tmp_path) == {"data", "out", "undisturbed"}


def test_what_was_left_by_another_configuration_is_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source, out = folder / "dataset.yaml", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(work, "write_targets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out)
    assert "what is finished, 2 tracks of" in capsys.readouterr().err
    peaks = folder / "peaks.narrowPeak"
    peaks.write_text(peaks.read_text() + "chrC\t0\t320\tnew\t1\t.\t1\t1\t1\t5\n")
    found = prepare(source, out)
    assert "1 of 2 tracks are there from an earlier attempt" in capsys.readouterr().err
    assert found.targets("chrC")[:10, 0].all()
    assert names(tmp_path) == {"data", "out"}


def test_a_damaged_column_of_an_earlier_attempt_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    source, out = folder / "dataset.yaml", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(work, "write_targets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out)
    cut, empty = sorted((tmp_path / ".out.preparing" / "pieces").iterdir())
    cut.write_bytes(cut.read_bytes()[:3_000])
    empty.write_bytes(b"")
    assert content(prepare(source, out).folder) == content(prepare(source, tmp_path / "fresh").folder)


# A limit on the size of a file stands in for a full disk: no mount and no root are needed.
LIMITED = """
import resource, signal, sys
from genossm.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("limit", "jobs", "kept"),
    [(100, 1, 0), (3_000, 1, 0), (12_000, 1, 2), (3_000, 2, 0), (12_000, 2, 2)],
)
def test_a_full_disk_is_a_sentence_and_what_is_finished_is_kept(
    folder: Path, tmp_path: Path, limit: int, jobs: int, kept: int
) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    open_inputs(load_dataset_config(source))  # so that the genome's cache is there already
    command = [sys.executable, "-c", LIMITED, str(limit), "prepare", str(source), "-o", str(out)]
    command += ["--jobs", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    stage = tmp_path / ".out.preparing"
    assert error.startswith(f"error: no space left on the disk while writing {out}")
    if stage.exists():
        assert error.endswith(f"which goes on from what waits in {stage}, or delete that folder too")
        assert names(stage) == {"pieces"} and len(names(stage / "pieces")) == kept
    else:
        assert error.endswith("nothing was left behind: free some space or choose another folder, then run the "
                              "command again")  # fmt: skip
    assert stage.exists() == (kept > 0)
    assert "Traceback" not in done.stderr
    assert names(tmp_path) - {".out.preparing"} == {"data"}
    assert content(prepare(source, out).folder) == content(prepare(source, tmp_path / "fresh").folder)
    assert names(tmp_path) == {"data", "out", "fresh"}


# More tracks than a process may have files open, until it asks for more: where it may.
FEW_FILES = """
import resource, sys
from genossm.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("most", [400, 60])
def test_more_tracks_than_open_files(folder: Path, tmp_path: Path, most: int) -> None:
    tracks = ", ".join(
        f"{{name: t{number}, file: {folder / 'peaks.narrowPeak'}, kind: peaks}}" for number in range(80)
    )
    command = [sys.executable, "-c", FEW_FILES, "60", str(most), "prepare", str(folder / "dataset.yaml")]
    command += ["-o", str(tmp_path / "out"), "--set", f"tracks=[{tracks}]"]
    done = subprocess.run(command, capture_output=True, text=True)
    if most == 400:
        assert done.returncode == 0, done.stderr
        assert len(PreparedDataset(tmp_path / "out").tracks) == 80
    else:
        assert done.returncode == 1
        assert "error: 80 tracks need 144 open files at once and this system allows 60: raise" in done.stderr


ONE_OF_MANY = """
import sys
from genossm.pipelines.prepare import prepare
print(prepare(sys.argv[1], sys.argv[2]).targets("chrC").sum())
"""


def test_ten_processes_that_make_the_same_dataset(folder: Path, tmp_path: Path, private_cache: Path) -> None:
    source, out = folder / "dataset.yaml", tmp_path / "out"
    command = [sys.executable, "-c", ONE_OF_MANY, str(source), str(out)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, printed
    assert {text for text, _ in printed} == {"7.0\n"}
    said = [errors for _, errors in printed]
    assert sum("preparing tiny" in errors for errors in said) == 1  # one worked
    assert sum("is up to date" in errors for errors in said) == 9
    assert names(tmp_path) == {"data", "out", "cache"}
    cached = sorted(path.name.split("-")[0].split(".")[-1] for path in private_cache.iterdir())
    assert cached == ["genossm", "verified"]  # the genome, and the note that the dataset is whole


def test_several_processes_make_the_same_bytes_as_one(folder: Path, tmp_path: Path) -> None:
    alone = prepare(folder / "dataset.yaml", tmp_path / "alone")
    several = prepare(folder / "dataset.yaml", tmp_path / "several", jobs=2)
    assert content(alone.folder) == content(several.folder)


def test_an_error_in_a_process_is_the_sentence_that_it_would_be_here(folder: Path, tmp_path: Path) -> None:
    import pyBigWig

    bigwig = pyBigWig.open(str(folder / "signal.bw"), "w")
    bigwig.addHeader([("chrA", 40_000), ("chrB", 20_011)])
    bigwig.addEntries(["chrA"], [100], ends=[200], values=[-1.0])
    bigwig.close()
    for jobs in (1, 2):
        with pytest.raises(DataError, match="track signal has values below 0 on chrA"):
            prepare(folder / "dataset.yaml", tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


def test_a_fasta_that_changed_after_prepare_is_refused(folder: Path, tmp_path: Path) -> None:
    dataset = prepare(folder / "dataset.yaml", tmp_path / "out")
    fasta = folder / "genome.fa"
    text = fasta.read_text()
    assert dataset.genome.window("chrA", 600, 603).size == 3
    place = text.index("A", 700)
    fasta.write_text(text[:place] + "C" + text[place + 1 :])  # one base, the same size
    with pytest.raises(DataError, match=r"is not the genome that .*out was made from \(sequence sha256"):
        _ = PreparedDataset(tmp_path / "out").genome
    fasta.write_text(
        re.sub("^[ACGTN]+", lambda line: line[0].lower(), text, flags=re.MULTILINE)
    )  # the same bases
    assert PreparedDataset(tmp_path / "out").genome.names == ("chrA", "chrB", "chrC")


@pytest.mark.parametrize("compress", ["none", "gzip"])
def test_a_flipped_bit_is_found(folder: Path, tmp_path: Path, compress: str) -> None:
    dataset = prepare(folder / "dataset.yaml", tmp_path / "out", overrides=[f"compress={compress}"])
    dataset.verify()
    path = tmp_path / "out" / "targets.h5"
    with h5py.File(path) as file:
        array = file["chrB/targets"]
        place = array.id.get_chunk_info(0).byte_offset if array.chunks else array.id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(place + 2)
        byte = raw.read(1)[0]
        raw.seek(place + 2)
        raw.write(bytes([byte ^ 64]))
    damaged = PreparedDataset(tmp_path / "out")
    with pytest.raises(DataError, match=r"targets\.h5 is damaged: its content is not what prepare wrote"):
        damaged.verify()
    if compress == "gzip":  # with checksums of its own
        with pytest.raises(
            FileError, match=r"targets\.h5 is damaged .*: copy it again, or run prepare again"
        ):
            damaged.targets("chrB")
    assert damaged.targets("chrA").shape == (1_250, 2)
