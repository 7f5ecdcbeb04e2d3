"""A prepared dataset: the folder that `prepare` writes, read lazily by every process that uses it.

The folder holds `dataset.json` (what it is made from), `targets.h5` (targets, masks and intervals of each
chromosome) and `windows.tsv` (input windows with their split). Bin i of a chromosome covers the bases
[i * bin_bp, min((i + 1) * bin_bp, length)); everything is 0-based and half-open.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from genossm.chrom_names import name_hint
from genossm.config import build
from genossm.dataset_config import TrackConfig, expand_variables
from genossm.errors import ConfigError, DataError, FileError
from genossm.file_reader import FileReader
from genossm.interval import bin_count
from genossm.scaling import Scaling
from genossm.storage import Coding, Storage
from genossm.windows import Window, read_windows

if TYPE_CHECKING:
    import h5py

    from genossm.genome import Genome

FORMAT = "genossm-dataset"
FORMAT_VERSION = 2
JSON_NAME, TARGETS_NAME, WINDOWS_NAME = "dataset.json", "targets.h5", "windows.tsv"

_KEYS = {"assembly", "bin_bp", "chromosomes", "config", "files", "genome", "margin_bp", "positive_rate"}
_KEYS |= {"provenance", "scaling", "split_check", "splits", "statistics", "storage", "tracks", "window_bp"}


def read_dataset_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a prepared dataset's `dataset.json`, after the folder was found complete.

    Raises:
        DataError: the folder is no prepared dataset, of another format version, or lacks or has cut-short
            files.
    """
    path = Path(folder) / JSON_NAME
    advice = "make it with `genossm prepare DATASET.yaml -o FOLDER`"
    if not path.is_file():
        what = "has no dataset.json" if path.parent.is_dir() else "does not exist"
        raise DataError(f"{folder} is no prepared dataset: it {what}; {advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): remove the folder and {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{folder} is no prepared dataset: its dataset.json is not of genossm; {advice}")
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder} is a prepared dataset of format version {content.get('format_version')}, this "
            f"genossm reads version {FORMAT_VERSION}: run prepare again (`genossm prepare DATASET.yaml -o {folder}`)"
        )
    absent = sorted(_KEYS - set(content))
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}: it was edited or cut short; {advice} --force")
    for name, entry in content["files"].items():
        part, size = Path(folder) / name, entry["bytes"]
        found = part.stat().st_size if part.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(
                f"{folder} is an incomplete prepared dataset: {name} {state}; copy it again or {advice} "
                "--force"
            )
    return content


@dataclass(frozen=True, slots=True)
class MaskParts:
    """The mask of a chromosome in parts.

    Attributes:
        starts, ends: int64 (runs,), bins that are masked for all tracks, sorted and apart.
        absent: int64, the columns of tracks without any value on the chromosome.
        own: whether a track has more masked bins than that, so that the whole mask must be read.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    absent: npt.NDArray[np.int64]
    own: bool


class PreparedDataset:
    """The prepared dataset in `folder`; cheap to open, safe to pickle, to fork and to share among workers.

    Args:
        folder: what `prepare` wrote.
        genome: FASTA to use where the recorded path is not valid on this machine; its bases must be the same.

    Attributes:
        folder: the folder, absolute.
        config: the dataset configuration, as a mapping.
        assembly: name of the genome build.
        tracks: the tracks, in the order of the target columns.
        window_bp, margin_bp, bin_bp: sizes in base pairs.
        lengths: chromosome name to length in bp, in the genome's order.
        splits: "train", "valid", "test" to chromosome names.
        positive_rate: for each peaks track the share of its unmasked bins that are positive.
        statistics: for each track, for "all" and each split: bins, unmasked, and of the unmasked bins mean,
            std and max (NaN where there are none).
        storage: how targets are stored, and the relative error that this makes in each track.
        compressed: whether HDF5 has to unpack the targets, which it does in one thread at a time.
        scaling: for each track with a `scale` in the YAML how its scaled targets come about, and the way back.
        scaled_statistics: for each of these `mean` and `std` of its scaled training bins, partners' together (NaN where
            there are none); empty in a dataset that an earlier genossm prepared.
        split_check: how many windows were checked against the targets of other splits (`windows`, `leaks`: 0),
            on how many chromosomes two splits meet (`shared_chromosomes`), and the fewest bp between a window
            of one and a target of another (`nearest_bp`, None where they never meet).
        provenance: inputs with their hashes, the genome's hash, version and date.
        files: bytes and sha256 of each file that `prepare` wrote beside dataset.json.

    Raises:
        DataError: the folder is no complete prepared dataset of this format version.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, genome: str | os.PathLike[str] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()  # files are opened later, perhaps in another working folder
        content = read_dataset_json(self.folder)
        self.config: dict[str, Any] = content["config"]
        self.assembly: str = content["assembly"]
        self.tracks: tuple[TrackConfig, ...] = tuple(
            build(TrackConfig, track, where=f"{self.folder / JSON_NAME}: tracks")
            for track in content["tracks"]
        )
        self.window_bp: int = content["window_bp"]
        self.margin_bp: int = content["margin_bp"]
        self.bin_bp: int = content["bin_bp"]
        self.lengths: dict[str, int] = dict(content["chromosomes"])
        self.splits: dict[str, tuple[str, ...]] = {
            name: tuple(names) for name, names in content["splits"].items()
        }
        self.statistics: dict[str, dict[str, dict[str, float]]] = {
            track: {split: _with_nan(numbers) for split, numbers in splits.items()}
            for track, splits in content["statistics"].items()
        }
        self.positive_rate: dict[str, float] = _with_nan(content["positive_rate"])
        record = content["storage"]
        self.storage = Storage(
            record["dtype"],
            [build(Coding, record["tracks"][track.name], where=JSON_NAME) for track in self.tracks],
        )
        self.compressed: bool = record["compressed"]
        self.scaling: dict[str, Scaling] = {
            track: build(Scaling, scaling, where=JSON_NAME) for track, scaling in content["scaling"].items()
        }
        self.scaled_statistics: dict[str, dict[str, float]] = {
            track: _with_nan(numbers) for track, numbers in content.get("scaled_statistics", {}).items()
        }
        self.split_check: dict[str, int | None] = content["split_check"]
        self.provenance: dict[str, Any] = content["provenance"]
        self.files: dict[str, dict[str, Any]] = content["files"]
        self._genome_record: dict[str, Any] = content["genome"]
        self._genome_override = None if genome is None else Path(genome).absolute()
        self._file: h5py.File | None = None
        self._file_owner = 0
        self._offsets: dict[str, int | None] = {}
        self._masks: dict[str, MaskParts] = {}

    def __repr__(self) -> str:
        return (
            f"PreparedDataset({str(self.folder)!r}, {self.assembly}, {len(self.lengths)} chromosomes, "
            f"{len(self.tracks)} tracks, {self.bin_bp}-bp bins)"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_file"] = None
        state["_offsets"], state["_masks"] = {}, {}
        for name in ("genome", "_reader"):
            state.pop(name, None)
        return state

    @property
    def track_names(self) -> tuple[str, ...]:
        """Names of the tracks, in the order of the target columns."""
        return tuple(track.name for track in self.tracks)

    @cached_property
    def genome(self) -> Genome:
        """The genome whose bases the dataset was made from, opened when first used.

        Looked for at the path given to the constructor, else at the recorded absolute path, at the path as
        the YAML wrote it (environment variables expanded), and at the recorded path relative to the folder.

        Raises:
            FileError: it is at none of these places.
            DataError: its names or bases are not those the dataset was made from.
        """
        from genossm.genome import Genome

        path = self._genome_path()
        genome = Genome(path)
        if genome.sha256 != self._genome_record["sequence_sha256"]:
            raise DataError(
                f"{path} is not the genome that {self.folder} was made from (sequence sha256 "
                f"{genome.sha256[:12]}…, recorded {self._genome_record['sequence_sha256'][:12]}…); give "
                "that genome, or prepare again"
            )
        return genome

    def windows(self, split: str) -> list[Window]:
        """The input windows of a split, which tile its chromosomes; they may run past chromosome ends.

        Raises:
            DataError: `split` is none of train, valid, test.
        """
        if split not in self.splits:
            raise DataError(f"there is no split {split!r}: allowed are {', '.join(self.splits)}")
        return [window for window in self._windows if window.split == split]

    def bins(self, chrom: str) -> int:
        """Number of bins of a chromosome, the last partial one included."""
        return bin_count(self.lengths[self._known(chrom)], self.bin_bp)

    def targets(
        self, chrom: str, start_bin: int = 0, stop_bin: int | None = None, *, scaled: bool = False
    ) -> npt.NDArray[np.float32]:
        """float32 (bins, tracks): the targets of the bins [start_bin, stop_bin) of a chromosome.

        Peaks tracks are 0 or 1, signal tracks in their aggregate's unit, or, with `scaled`, as their `scale`
        in the YAML says. Masked bins hold 0 or what was there.

        Raises:
            DataError: unknown chromosome, or bins outside [0, bins(chrom)].
            FileError: the file is missing or damaged.
        """
        values = self.storage.decode(self.stored(chrom, start_bin, stop_bin))
        if scaled:
            for column, track in enumerate(self.tracks):
                if track.name in self.scaling:
                    values[:, column] = self.scaling[track.name].forward(values[:, column])
        return values

    def stored(
        self,
        chrom: str,
        start_bin: int = 0,
        stop_bin: int | None = None,
        *,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """(bins, tracks) of the stored dtype: compact numbers, of which `storage.decode` makes the targets.

        They are put into `out`, C-contiguous, of that shape and dtype, where it is given. Errors as `targets`.
        """
        start, stop = self._range(chrom, start_bin, stop_bin)
        rows = np.empty((stop - start, len(self.tracks)), dtype=self.storage.dtype) if out is None else out
        offset = self._offset(chrom)
        if offset is None:
            rows[:] = self._rows(f"{chrom}/targets", start, stop)
        elif rows.size:  # in one piece: read without HDF5, whose own way takes four times as long
            self._reader.fill(rows, offset + start * rows.strides[0])
        return rows

    def mask(self, chrom: str, start_bin: int = 0, stop_bin: int | None = None) -> npt.NDArray[np.bool_]:
        """bool (bins, tracks): False where a bin has no loss and no metric. Errors as `targets`."""
        start, stop = self._range(chrom, start_bin, stop_bin)
        parts = self.mask_parts(chrom)
        if parts.own:
            return self._rows(f"{chrom}/mask", start, stop).astype(np.bool_)
        mask = np.ones((stop - start, len(self.tracks)), dtype=np.bool_)
        first, last = np.searchsorted(parts.ends, start, side="right"), np.searchsorted(parts.starts, stop)
        for low, high in zip(parts.starts[first:last], parts.ends[first:last], strict=True):
            mask[max(low - start, 0) : high - start] = False
        mask[:, parts.absent] = False
        return mask

    def mask_parts(self, chrom: str) -> MaskParts:
        """What the mask of a chromosome is made of; small, and kept in memory. Errors as `targets`."""
        if chrom not in self._masks:
            attributes = self._open()[f"{self._known(chrom)}/mask"].attrs
            starts, ends = self._intervals(f"{chrom}/masked")
            self._masks[chrom] = MaskParts(starts, ends, attributes["absent"], bool(attributes["own"]))
        return self._masks[chrom]

    @property
    def content_hash(self) -> str:
        """A hash of what is in it, sequence, targets and windows; the same wherever it lies."""
        parts = [
            self._genome_record["sequence_sha256"],
            *(self.files[name]["sha256"] for name in sorted(self.files)),
        ]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Read the files whole, and compare them with what `prepare` wrote.

        Raises:
            DataError: a file is damaged.
        """
        for name, entry in self.files.items():
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise DataError(
                        f"{self.folder / name} is damaged: its content is not what prepare wrote; copy it again, or "
                        "run prepare again with --force"
                    )

    def peaks(self, chrom: str, track: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(starts, ends) in bp of the merged peaks of a peaks track, clipped to the chromosome.

        Raises:
            DataError: unknown chromosome or track, or a track of kind signal.
        """
        kinds = {entry.name: entry.kind for entry in self.tracks}
        if kinds.get(track) != "peaks":
            allowed = ", ".join(name for name, kind in kinds.items() if kind == "peaks") or "none"
            raise DataError(f"{track!r} is no peaks track of {self.folder}: it has {allowed}")
        return self._intervals(f"{self._known(chrom)}/peaks/{track}")

    def excluded(self, chrom: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(starts, ends) in bp of what is left out of `chrom`: the exclude files and runs of N, merged."""
        return self._intervals(f"{self._known(chrom)}/excluded")

    @cached_property
    def _reader(self) -> FileReader:
        return FileReader(self.folder / TARGETS_NAME)

    @cached_property
    def _windows(self) -> list[Window]:
        return read_windows(self.folder / WINDOWS_NAME)

    def _genome_path(self) -> Path:
        if self._genome_override is not None:
            return self._genome_override
        record = self._genome_record
        written = record["as_written"]
        candidates: list[Path] = [Path(record["path"]), self.folder / record["relative_path"]]
        # The variable may be set on the machine of `prepare` only; then the other places remain.
        with suppress(ConfigError):
            expanded = Path(expand_variables(written, str(self.folder)))
            candidates += [expanded] if expanded.is_absolute() else []
        for path in candidates:
            if path.is_file():
                return path
        raise FileError(
            f"the genome of {self.folder} is not at {record['path']}, nor at {written}, nor at "
            f"{candidates[1]}; put it there, or open the dataset with PreparedDataset(folder, genome=FASTA)"
        )

    def _known(self, chrom: str) -> str:
        if chrom not in self.lengths:
            raise DataError(f"{self.folder} has no chromosome {chrom!r}: {name_hint(chrom, self.lengths)}")
        return chrom

    def _range(self, chrom: str, start_bin: int, stop_bin: int | None) -> tuple[int, int]:
        bins = self.bins(chrom)
        stop = bins if stop_bin is None else stop_bin
        if not 0 <= start_bin <= stop <= bins:
            raise DataError(f"bins [{start_bin}, {stop}) of {chrom}: they must lie within [0, {bins})")
        return start_bin, stop

    def _rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            rows: npt.NDArray[Any] = self._open()[name][start:stop]
        except (OSError, KeyError) as error:
            raise self._damaged(error) from error
        return rows

    def _offset(self, chrom: str) -> int | None:
        """Where the targets of a chromosome begin in the file, None where HDF5 must read them."""
        if chrom not in self._offsets:
            self._offsets[chrom] = self._open()[f"{chrom}/targets"].id.get_offset()
        return self._offsets[chrom]

    def _damaged(self, reason: object) -> FileError:
        return FileError(
            f"{self.folder / TARGETS_NAME} is damaged ({reason}): copy it again, or run prepare again"
        )

    def _intervals(self, key: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        pairs: npt.NDArray[np.int64] = self._open()[key][:]
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    def _open(self) -> h5py.File:
        """This process's own handle: one inherited through a fork shares the parent's file position."""
        if self._file is None or self._file_owner != os.getpid():
            import h5py

            if self._file is not None:
                self._file.close()  # or HDF5 would find the inherited one open and share it
            path = self.folder / TARGETS_NAME
            try:
                self._file = h5py.File(path, "r")
            except OSError as error:
                raise FileError(f"cannot read {path}: {error}; run prepare again") from error
            self._file_owner = os.getpid()
        return self._file


def _with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    """JSON's null, which stands for a mean of no bins, as NaN."""
    return {name: math.nan if number is None else number for name, number in numbers.items()}
