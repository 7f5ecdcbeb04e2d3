"""Tests of genossm.genome: the same bases in any layout, one cache for many processes, clear refusals."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from Bio import bgzf
from hypothesis import given, settings
from hypothesis import strategies as st

import genossm.cache_file as cache_module
import genossm.genome as genome_module
import genossm.lock as lock_module
from genossm.errors import DataError, FileError
from genossm.genome import Genome
from genossm.sequence import NO_BASE, decode, encode

RECORDS = {"chrA": "ACGTNNacgtRYKM" * 9, "chrB": "T", "chr_C": "GATTACA" * 20}


def fasta_text(
    records: dict[str, str], width: int = 60, newline: str = "\n", last_newline: bool = True
) -> bytes:
    lines = []
    for name, bases in records.items():
        lines.append(f">{name} some description")
        lines += [bases[start : start + width] for start in range(0, len(bases), width)]
    return (newline.join(lines) + (newline if last_newline else "")).encode()


def write_bgzip(path: Path, content: bytes) -> None:
    with bgzf.BgzfWriter(str(path), "wb") as stream:
        for start in range(0, len(content), 5000):  # several blocks
            stream.write(content[start : start + 5000])
            stream.flush()


def write_fasta(path: Path, records: dict[str, str] = RECORDS, **layout: object) -> Path:
    content = fasta_text(records, **layout)  # type: ignore[arg-type]
    write_bgzip(path, content) if path.suffix in (".gz", ".bgz") else path.write_bytes(content)
    return path


def run_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; no cache folder is chosen, unlike in other tests."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("GENOSSM_CACHE", raising=False)
    return folder


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "genome.fa")


def test_names_lengths_and_codes(fasta: Path) -> None:
    genome = Genome(fasta)
    assert genome.path == fasta
    assert genome.names == tuple(RECORDS)
    assert genome.lengths == {name: len(bases) for name, bases in RECORDS.items()}
    assert list(genome.lengths) == list(RECORDS)
    assert len(genome) == 3 and "chrB" in genome and "chrX" not in genome and 7 not in genome
    for name, bases in RECORDS.items():
        assert np.array_equal(genome.chromosome(name), encode(bases))
    assert "3 chromosomes" in repr(genome)


def test_a_chromosome_is_a_read_only_view(fasta: Path) -> None:
    codes = Genome(fasta).chromosome("chrA")
    assert not codes.flags.owndata and not codes.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        codes[0] = 1


@given(st.integers(-300, 500), st.integers(0, 500))
def test_a_window_is_padded_past_the_ends(tiny_folder: Path, start: int, length: int) -> None:
    genome = Genome(tiny_folder / "genome.fa")
    for chrom, at in (("chrC", start), ("chrC", genome.lengths["chrC"] - start)):
        whole = decode(genome.chromosome(chrom))
        expected = "".join(whole[base] if 0 <= base < len(whole) else "N" for base in range(at, at + length))
        window = genome.window(chrom, at, at + length)
        assert window.dtype == np.int8
        assert decode(window) == expected


def test_a_window_is_the_callers_own(fasta: Path) -> None:
    genome = Genome(fasta)
    window = genome.window("chrA", 0, 5)
    window[:] = NO_BASE
    assert decode(genome.window("chrA", 0, 5)) == "ACGTN"


def test_impossible_windows_are_refused(fasta: Path) -> None:
    genome = Genome(fasta)
    with pytest.raises(DataError, match=r"chrA:5-4 ends before it starts"):
        genome.window("chrA", 5, 4)
    with pytest.raises(DataError, match=r"no chromosome 'A'; did you mean chrA\?"):
        genome.window("A", 0, 4)
    with pytest.raises(DataError, match=r"no chromosome 'chr9'"):
        genome.chromosome("chr9")


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.text("chrXYZ0123456789_.-", min_size=1, max_size=8),
        st.text("ACGTNacgtnRY", min_size=1, max_size=90),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 70),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_layout_gives_the_same_genome(
    records: dict[str, str], width: int, newline: str, last_newline: bool, slice_bp: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(genome_module, "_SLICE_BP", slice_bp)
        plain = Genome(write_fasta(Path(folder) / "plain.fa", records))
        content = fasta_text(
            {name: bases.upper() for name, bases in records.items()}, width, newline, last_newline
        )
        other_path = Path(folder) / "other.fa.gz"
        write_bgzip(other_path, content)
        other = Genome(other_path)
        assert other.lengths == plain.lengths
        assert other.sha256 == plain.sha256
        for name, bases in records.items():
            assert np.array_equal(plain.chromosome(name), encode(bases))
            assert np.array_equal(other.chromosome(name), encode(bases))


@pytest.mark.parametrize("name", ["genome.fa.gz", "genome.fa.bgz", "genome.fa", "genome"])
def test_compression_is_told_by_content(tmp_path: Path, fasta: Path, name: str) -> None:
    expected = Genome(fasta).sha256
    for kind in ("plain", "gzip", "bgzip"):
        path = tmp_path / kind / name
        path.parent.mkdir()
        content = fasta.read_bytes()
        if kind == "bgzip":
            write_bgzip(path, content)
        else:
            path.write_bytes(content if kind == "plain" else gzip.compress(content))
        assert Genome(path).sha256 == expected


def test_the_hash_sees_names_order_and_bases(tmp_path: Path) -> None:
    variants: list[dict[str, str]] = [
        {"a": "ACGT", "b": "AC"},
        {"b": "AC", "a": "ACGT"},
        {"a": "ACGTA", "b": "C"},
        {"a": "ACGT", "c": "AC"},
        {"a": "ACGT", "b": "AN"},
    ]
    hashes = {
        Genome(write_fasta(tmp_path / f"{at}.fa", records)).sha256 for at, records in enumerate(variants)
    }
    assert len(hashes) == len(variants)


def test_the_second_opening_reads_only_the_cache(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Genome(fasta)
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["genome.fa", "genome.fa.genossm"]
    monkeypatch.setattr(genome_module, "_build", lambda *_: pytest.fail("built again"))
    second = Genome(fasta)
    assert second.sha256 == first.sha256
    assert np.array_equal(second.chromosome("chrA"), first.chromosome("chrA"))


@pytest.mark.parametrize("bases", ["GGGGG", "GGGGGGGGGG"])
def test_a_changed_fasta_is_read_again(tmp_path: Path, bases: str) -> None:
    path = write_fasta(tmp_path / "genome.fa", {"chr1": "ACGTA"})
    before = Genome(path)
    time_ns = path.stat().st_mtime_ns
    write_fasta(path, {"chr1": bases})
    os.utime(path, ns=(time_ns + 1, time_ns + 1))  # one nanosecond is enough, also at the same size
    after = Genome(path)
    assert decode(after.chromosome("chr1")) == bases
    assert after.sha256 != before.sha256
    assert decode(before.chromosome("chr1")) == "ACGTA"  # who has it open keeps what was opened
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(pickle.dumps(before))


@pytest.mark.parametrize("damage", ["empty", "short", "long", "garbage", "header"])
def test_a_damaged_cache_is_built_again(fasta: Path, damage: str) -> None:
    expected = Genome(fasta).sha256
    cache = fasta.with_name("genome.fa.genossm")
    content = cache.read_bytes()
    cache.write_bytes(
        {
            "empty": b"",
            "short": content[:-1],
            "long": content + b"\0",
            "garbage": bytes(len(content)),
            "header": content.replace(b"{", b"[", 1),
        }[damage]
    )
    assert Genome(fasta).sha256 == expected
    assert cache.read_bytes() == content


def forbid_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write everywhere
        writable = cache_module._can_write
        monkeypatch.setattr(cache_module, "_can_write", lambda path: path != folder and writable(path))
    else:
        folder.chmod(0o555)


def test_a_read_only_folder_sends_the_cache_elsewhere(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, bases in zip(folders, ("ACGT", "TTTT"), strict=True):
        folder.mkdir()
        write_fasta(folder / "genome.fa.gz", {"chr1": bases})
    with monkeypatch.context() as patch:
        for folder, bases in zip(folders, ("ACGT", "TTTT"), strict=True):
            forbid_writing(folder, patch)
            genome = Genome(folder / "genome.fa.gz")
            assert decode(genome.chromosome("chr1")) == bases  # same file name, other folder: not mixed up
            assert [path.name for path in folder.iterdir()] == ["genome.fa.gz"]
            assert decode(pickle.loads(pickle.dumps(genome)).chromosome("chr1")) == bases
    for folder in folders:
        folder.chmod(0o755)
    assert len(list((home / ".cache" / "genossm").iterdir())) == 2


def test_a_chosen_cache_folder_wins_over_the_fastas(
    fasta: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Genome(fasta).sha256
    chosen = tmp_path / "cache"
    monkeypatch.setenv("GENOSSM_CACHE", str(chosen))
    beside = fasta.with_name("genome.fa.genossm")
    assert Genome(fasta).sha256 == expected  # one that is there already is not built a second time
    assert not chosen.exists()
    beside.unlink()
    assert Genome(fasta).sha256 == pickle.loads(pickle.dumps(Genome(fasta))).sha256 == expected
    assert len(list(chosen.iterdir())) == 1
    assert not beside.exists() and list(home.iterdir()) == []


def test_a_chosen_cache_folder_that_cannot_be_written_is_an_error(
    fasta: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private_cache.mkdir()
    forbid_writing(private_cache, monkeypatch)
    with pytest.raises(FileError, match=rf"cannot be written to {private_cache}: set GENOSSM_CACHE"):
        Genome(fasta)
    assert not fasta.with_name("genome.fa.genossm").exists()


def test_a_user_without_a_home_is_no_obstacle(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.os.path, "expanduser", lambda path: path)  # as for an unknown user id
    assert decode(Genome(fasta).window("chrA", 0, 4)) == "ACGT"


def test_no_place_for_the_cache_is_a_sentence(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_can_write", lambda _: False)
    with pytest.raises(FileError, match="set GENOSSM_CACHE"):
        Genome(fasta)


def test_the_cache_folder_can_be_named(fasta: Path, tmp_path: Path) -> None:
    genome = Genome(fasta, cache_dir=tmp_path / "here" / "deep")
    assert len(list((tmp_path / "here" / "deep").iterdir())) == 1
    assert not fasta.with_name("genome.fa.genossm").exists()
    copy = pickle.loads(pickle.dumps(genome))
    assert copy.sha256 == genome.sha256
    assert not fasta.with_name("genome.fa.genossm").exists()


def test_pickling_costs_a_name_and_not_the_bases(tmp_path: Path) -> None:
    genome = Genome(write_fasta(tmp_path / "genome.fa", {"chr1": "ACGT" * 100_000}))
    content = pickle.dumps(genome)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert np.array_equal(copy.window("chr1", -5, 100), genome.window("chr1", -5, 100))


TOGETHER = """
import sys, time
from pathlib import Path
import genossm.genome as module
import genossm.lock
folder = Path(sys.argv[1])
build = module._build
def counted(*arguments):
    with (folder / "builds").open("a") as stream:
        stream.write("built\\n")
    time.sleep(0.2)
    build(*arguments)
module._build = counted
if sys.argv[2] == "no-lock":
    genossm.lock._flock = None
(folder / f"ready-{sys.argv[3]}").touch()
while not (folder / "go").exists():
    time.sleep(0.005)
genome = module.Genome(folder / "fasta" / "genome.fa.gz")
print(genome.sha256, int(genome.window("chr1", 0, 200_000).sum()))
"""


@pytest.mark.parametrize("locking", ["lock", "no-lock"])
def test_many_processes_start_together(tmp_path: Path, locking: str) -> None:
    (tmp_path / "fasta").mkdir()
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), size=200_000))
    write_fasta(tmp_path / "fasta" / "genome.fa.gz", {"chr1": bases})
    processes = [run_python(TOGETHER, tmp_path, locking, number) for number in range(5)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, answers
    expected = f"{Genome(tmp_path / 'fasta' / 'genome.fa.gz').sha256} {int(encode(bases).sum())}\n"
    assert {answer for answer, _ in answers} == {expected}
    builds = (tmp_path / "builds").read_text().count("built")
    assert builds == 1 if locking == "lock" else 1 <= builds <= 5
    left = sorted(path.name for path in (tmp_path / "fasta").iterdir())
    assert left == ["genome.fa.gz", "genome.fa.gz.genossm"]


def test_a_file_system_without_locks_works(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock_module, "_flock", SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4))
    assert decode(Genome(fasta).window("chrA", 0, 4)) == "ACGT"
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["genome.fa", "genome.fa.genossm"]


KILLED = """
import os, signal, sys
import genossm.genome as module
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
module._encode_slice = kill
module.Genome(sys.argv[1])
"""


def test_a_killed_builder_leaves_nothing_half_made(fasta: Path) -> None:
    process = run_python(KILLED, fasta)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    cache = fasta.with_name("genome.fa.genossm")
    remains = list(fasta.parent.glob(".genome.fa.genossm.*"))
    assert remains and not cache.exists()
    for path in remains:
        os.utime(path, (0, 0))
    assert decode(Genome(fasta).window("chrA", 0, 4)) == "ACGT"
    assert sorted(path.name for path in fasta.parent.iterdir()) == ["genome.fa", "genome.fa.genossm"]


def test_remains_that_vanish_meanwhile_are_no_obstacle(fasta: Path) -> None:
    remains = fasta.with_name(".genome.fa.genossm.1.aa.tmp")
    remains.symlink_to(fasta.parent / "nothing")  # listed, and yet its stat finds no file
    assert decode(Genome(fasta).window("chrA", 0, 4)) == "ACGT"


def test_a_full_disk_leaves_nothing_behind(fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(genome_module.os, "fsync", full)
    with pytest.raises(FileError, match="no space left"):
        Genome(fasta)
    assert [path.name for path in fasta.parent.iterdir()] == ["genome.fa"]


FORKED = """
import multiprocessing, sys
import numpy as np
from genossm.genome import Genome
genome = Genome(sys.argv[1])
def total(at):
    return int(genome.window("chr1", at * 1000, at * 1000 + 2000).sum())
with multiprocessing.get_context("fork").Pool(3) as pool:
    forked = pool.map(total, range(200), chunksize=1)
assert forked == [total(at) for at in range(200)]
print("equal")
"""


def test_forked_workers_read_the_same(tmp_path: Path) -> None:
    bases = "".join(np.random.default_rng(1).choice(list("ACGTN"), size=201_000))
    process = run_python(FORKED, write_fasta(tmp_path / "genome.fa", {"chr1": bases}))
    answer, errors = process.communicate(timeout=60)
    assert (process.returncode, answer) == (0, "equal\n"), errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "no FASTA file"),
        (b"chr1\t0\t100\n", "no FASTA file"),
        (b">chr1\nACGT\n>chr1\nGG\n", r"no FASTA file.*Duplicate key .chr1."),
        (b">chr1\n>chr2\nACGT\n", "no bases in the record 'chr1'"),
        (b">chr1\nACGT\n>chr2\n", "no bases in the record 'chr2'"),
        (b">chr1\nACGTACGT\nACG\nACGTACGT\n", r"no FASTA file.*Line length"),
        (b">chr1\nACGTACGT\n\n\n>chr2\nACGT\n", "no FASTA file"),  # which pyfaidx calls a bug of its own
        (b">\nACGT\n", "no FASTA file"),
        (b">chr1\nMKLV\n", r"record 'chr1'.*the character 'L' at position 2"),
        (b">chr1\nAC-GT\n", r"the character '-'"),
        (b">chr1\nAC GT\n", r"the character ' '"),
        (b">chr1\nAC\xff\xfeGT\n", "no FASTA file"),
        (bytes(range(256)), "no FASTA file"),
    ],
)
def test_what_is_no_genome_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("genome.fa", "genome.fa.gz"):
        path = tmp_path / name
        path.write_bytes(content if name == "genome.fa" else gzip.compress(content))
        with pytest.raises(DataError, match=message) as caught:
            Genome(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        path.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at_block", [True, False])
def test_truncated_bgzip_is_refused(tmp_path: Path, at_block: bool) -> None:
    path = write_fasta(tmp_path / "genome.fa.gz", {"chr1": "ACGT" * 10_000})
    with path.open("rb") as stream:
        blocks = list(bgzf.BgzfBlocks(stream))
    path.write_bytes(path.read_bytes()[: blocks[3][0] + (0 if at_block else 11)])
    with pytest.raises(FileError, match="cut off"):
        Genome(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_fasta_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none\.fa does not exist"):
        Genome(tmp_path / "none.fa")
    with pytest.raises(FileError, match="is a folder"):
        Genome(tmp_path)


def test_a_pathological_index_beside_the_fasta_is_not_used(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "genome.fa")
    index = tmp_path / "genome.fa.fai"
    index.write_text("chrA\t3\t6\t3\t4\n")
    os.utime(index, (time.time() + 1000, time.time() + 1000))
    assert Genome(path).lengths["chrA"] == len(RECORDS["chrA"])
    assert index.read_text() == "chrA\t3\t6\t3\t4\n"


def test_a_fasta_that_changes_while_it_is_read_is_refused(
    fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache = genome_module._write_cache

    def and_meanwhile(*arguments: object) -> None:
        write_cache(*arguments)  # type: ignore[arg-type]
        with fasta.open("a") as stream:
            stream.write(">chrD\nACGT\n")

    with monkeypatch.context() as patch:
        patch.setattr(genome_module, "_write_cache", and_meanwhile)
        with pytest.raises(DataError, match="was changed while it was being read"):
            Genome(fasta)
    assert [path.name for path in fasta.parent.iterdir()] == ["genome.fa"]
    assert Genome(fasta).names == (*RECORDS, "chrD")


def test_progress_is_shown_for_large_genomes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Genome(write_fasta(tmp_path / "small.fa"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(genome_module, "_LARGE_BP", 100)
    Genome(write_fasta(tmp_path / "large.fa"))
    output = capsys.readouterr()
    assert output.out == "" and "reading large.fa" in output.err and "bp" in output.err


@pytest.mark.realdata
def test_yeast_is_read_base_by_base(realdata: Path, tmp_path: Path) -> None:
    path = realdata / "sacCer3" / "sacCer3.fa.gz"
    before = sorted(entry.name for entry in path.parent.iterdir())
    genome = Genome(path, cache_dir=tmp_path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == before
    sizes = (path.parent / "sacCer3.chrom.sizes").read_text().split()
    assert genome.lengths == dict(zip(sizes[::2], map(int, sizes[1::2]), strict=True))
    digest = hashlib.sha256()
    for record in gzip.decompress(path.read_bytes()).decode().split(">")[1:]:
        name, _, bases = record.partition("\n")
        bases = bases.replace("\n", "")
        codes = np.searchsorted(np.frombuffer(b"ACGT", np.uint8), np.frombuffer(bases.encode(), np.uint8))
        assert np.array_equal(genome.chromosome(name), codes)
        digest.update(f">{name} {len(bases)}\n".encode() + codes.astype(np.int8).tobytes())
    assert genome.sha256 == digest.hexdigest()


@pytest.mark.realdata
def test_a_human_slice_keeps_its_unknown_bases(realdata: Path, tmp_path: Path) -> None:
    genome = Genome(realdata / "hg38_chr1_1m" / "hg38_chr1_0-1000000.fa.gz", cache_dir=tmp_path)
    assert genome.lengths == {"chr1": 1_000_000}
    unknown = np.count_nonzero(genome.chromosome("chr1") == NO_BASE)
    assert 0.155 < unknown / 1_000_000 < 0.165
    assert decode(genome.window("chr1", 904_768, 904_788)) == "CGCCACCAGGGGGCGCCACA"  # README: a CTCF core
