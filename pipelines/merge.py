"""Merge the parts of a prediction, made by any number of jobs, into its files, once each bin is there exactly once."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from genossm import __version__
from genossm.atomic import atomic_write_text
from genossm.errors import DataError
from genossm.lock import only_one
from genossm.pipelines.collect import PredictionResult, collect
from genossm.pipelines.parts import Parts
from genossm.pipelines.plan import PARTS_FOLDER, Plan, discard, read_plan
from genossm.pipelines.shards import Shard, shards_of
from genossm.progress import say

RUN_FILE = "run.json"
MOST_NAMED = 8


def merge(folder: str | os.PathLike[str], *, jobs: int | None = None) -> PredictionResult:
    """Write the files of a prediction whose parts are complete, then remove the parts.

    Each part is checked for its bins, shape, identity and checksum, and every wanted bin must be in exactly one of
    them. The model and the genome are not needed. A folder that was merged before is left as it is; a merger that was
    killed goes on with the tracks that it had not written.

    Args:
        folder: the output folder of `predict`.
        jobs: processes that write tracks; None takes all cores, at most 8, and none but this one for little.

    Raises:
        ConfigError: `jobs` is below 1.
        DataError: there is no unfinished prediction, or parts are missing, damaged or there twice; the message names
            them and the commands that make them.
        FileError: the disk is full.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: predict first, genossm predict ... -o {folder}")
    with alone(folder):
        plan = read_plan(folder)
        if plan is None:
            done = finished(folder)
            if done is None:
                raise DataError(
                    f"{folder} holds no parts of a prediction: make them first, genossm predict ... -o {folder} "
                    "--shard i/n for each i"
                )
            say(f"{folder} is merged already; nothing to do")
            return done
        parts = Parts(folder, plan)
        _refuse_faults(parts)
        return finish(folder, parts, _times(shard_records(folder)), jobs)


def finish(folder: Path, parts: Parts, times: Mapping[str, Any], jobs: int | None = None) -> PredictionResult:
    """Prove that the parts are complete, write all files of the prediction and run.json, and remove the parts.

    Call it within `alone`. What an earlier prediction left in the folder goes first.
    """
    check_exactly_once(parts)
    plan = parts.plan
    names = plan.file_names()
    for name in set(_recorded(folder).get("files", ())) - set(names):
        (folder / name).unlink(missing_ok=True)
    (folder / RUN_FILE).unlink(missing_ok=True)
    files, summary = collect(folder, parts, jobs)
    record = {
        "genossm": __version__,
        "identity": plan.identity,
        **plan.record,
        "options": options_of(plan),
        **times,
        "parts": len(parts),
        "tracks": [asdict(track) for track in plan.tracks],
        "chroms": list(plan.bins),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": [file.name for file in files],
        "sizes": sizes(folder, names),
        "summary": summary,
    }
    atomic_write_text(folder / RUN_FILE, json.dumps(record, indent=2, default=str) + "\n")
    discard(folder)
    return PredictionResult(folder, files, summary)


def options_of(plan: Plan) -> dict[str, Any]:
    """The part of run.json that says what was made of the values."""
    options = plan.options
    return {
        "hdf5": options.hdf5,
        "sequences": options.sequences,
        "thresholds": dict(options.thresholds),
    }


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this process writes files in `folder`, no other does, where the file system has locks."""
    with only_one(
        folder / ".merge.lock", waiting=lambda: say(f"another process writes {folder}; waiting for it")
    ):
        yield


def finished(folder: Path) -> PredictionResult | None:
    """The finished prediction in `folder`, None where there is none or a file of it is missing or was changed."""
    record = _recorded(folder)
    if not record or record.get("sizes") != sizes(folder, record.get("sizes", {})):
        return None
    return PredictionResult(folder, tuple(folder / name for name in record["files"]), record["summary"])


def sizes(folder: Path, names: Sequence[str] | Mapping[str, Any]) -> dict[str, int | None]:
    """Bytes of each file, None where it is missing: a damaged output is not a finished one."""
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in names}


def write_shard_record(folder: Path, shard: Shard, record: Mapping[str, Any]) -> None:
    """Say that a job has begun its shard (without `seconds`) or completed it."""
    path = folder / PARTS_FOLDER / f"shard-{shard.index}-of-{shard.count}.json"
    atomic_write_text(path, json.dumps({"shard": str(shard), **record}) + "\n")


def shard_records(folder: Path) -> list[dict[str, Any]]:
    """What jobs have said about their shards, in order."""
    records = []
    for path in (folder / PARTS_FOLDER).glob("shard-*-of-*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.append(record | {"at": Shard.parse(record["shard"])})
    return sorted(records, key=lambda record: (record["at"].count, record["at"].index))


def check_exactly_once(parts: Parts) -> None:
    """Prove from what the files say that every wanted bin is in one part, once.

    Raises:
        DataError: a bin is in none, or in several.
    """
    found = parts.coverage()
    for chrom, rows in parts.selection.bins.items():
        counts = np.zeros(-(-parts.selection.lengths[chrom] // parts.plan.bin_bp), dtype=np.int64)
        for (first, stop), times in found.get(chrom, Counter()).items():
            counts[first:stop] += times
        for first, stop in rows.tolist():
            wrong = np.flatnonzero(counts[first:stop] != 1)
            if wrong.size:
                number = first + int(wrong[0])
                raise DataError(
                    f"bin {number:,} of {chrom} is in {counts[number]} parts of {parts.folder} and must be in exactly "
                    "1: delete that folder and predict again"
                )


def _refuse_faults(parts: Parts) -> None:
    faults = {index: fault for index in range(len(parts)) if (fault := parts.fault(index))}
    strangers = parts.strangers()
    if not faults and not strangers:
        return
    lines = [
        f"part {index} ({parts.path(index).name}, {parts.where(index)}) {fault}"
        for index, fault in list(faults.items())[:MOST_NAMED]
    ]
    if len(faults) > MOST_NAMED:
        lines.append(f"and {len(faults) - MOST_NAMED:,} more")
    sentences = []
    if faults:
        sentences.append(
            f"{len(faults):,} of {len(parts):,} parts of {parts.folder.parent} are not complete: {'; '.join(lines)}. "
            f"Make them with: {'; '.join(_commands(parts, list(faults)))}"
        )
    if strangers:
        named = ", ".join(path.name for path in strangers[:MOST_NAMED])
        sentences.append(
            f"{parts.folder} holds {len(strangers)} files of values that are no part of this prediction, or are one "
            f"doubled: {named}. Delete them"
        )
    raise DataError(". ".join(sentences) + ", then merge again")


def _commands(parts: Parts, indices: Sequence[int]) -> list[str]:
    """The commands that make some parts: of the shards that have them where shards were at work, else of all."""
    line = shlex.join(parts.plan.command)
    counts = {record["at"].count for record in shard_records(parts.folder.parent)}
    if not counts:
        return [line]
    shards = shards_of(parts.bases_read, max(counts), indices)
    named = [f"{line} --shard {shard}" for shard in shards[:MOST_NAMED]]
    if len(shards) > MOST_NAMED:
        rest = ", ".join(str(shard) for shard in shards[MOST_NAMED:])
        named.append(f"and the same for the shards {rest}")
    return named


def _times(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What run.json says of who computed when: the first start, the devices, the seconds of all jobs together."""
    done = [record for record in records if "seconds" in record]
    batches = sorted({record["batch_size"] for record in done if record["batch_size"] is not None})
    return {
        "device": ", ".join(sorted({record["device"] for record in done})),
        "batch_size": batches[0] if len(batches) == 1 else batches or None,
        "started": min((record["started"] for record in done), default=None),
        "seconds": round(sum(record["seconds"] for record in done), 1),
        "shards": [{name: value for name, value in record.items() if name != "at"} for record in done],
    }


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
