"""Whether the files of a prepared dataset are those that `prepare` wrote: read whole once, not at every start.

A byte that flipped on a disk or in a copy makes other targets, not an error: plain targets are read without checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from genossm.amounts import size_text
from genossm.atomic import atomic_write_text
from genossm.cache_file import cache_folder
from genossm.dataset import PreparedDataset
from genossm.progress import say

_TOLD_BYTES = 1 << 30


def verify_once(dataset: PreparedDataset) -> None:
    """Compare the files with what `prepare` wrote, unless that was done for these files as they are now.

    What was found right is noted, with sizes, times of change and inodes, in `$GENOSSM_CACHE`, else in ~/.cache/genossm;
    where neither can be written, files are read each time.

    Raises:
        DataError: a file is damaged.
    """
    state = _state(dataset)
    note = _note_of(dataset)
    if note is not None:
        with suppress(OSError, ValueError):
            if json.loads(note.read_text(encoding="utf-8")) == state:
                return
    total = sum(entry["bytes"] for entry in dataset.files.values())
    if total >= _TOLD_BYTES:
        say(
            f"reading {size_text(total)} of {dataset.folder} to see that nothing is damaged; once for these files"
        )
    dataset.verify()
    if _state(dataset) == state:
        mark_verified(dataset)


def mark_verified(dataset: PreparedDataset) -> None:
    """Note that the files, as they are now, are what `prepare` wrote."""
    note = _note_of(dataset)
    if note is not None:
        with suppress(OSError):  # then they are read again
            note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(note, json.dumps(_state(dataset)) + "\n")


def _state(dataset: PreparedDataset) -> dict[str, Any]:
    """What tells the files from others and from themselves once changed; the time of change cannot be set back."""
    found: dict[str, Any] = {}
    for name, entry in dataset.files.items():
        status = (dataset.folder / name).stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        found[str(dataset.folder / name)] = [entry["sha256"], *stamp]
    return found


def _note_of(dataset: PreparedDataset) -> Path | None:
    folder, key = cache_folder(), hashlib.sha256(os.fsencode(dataset.folder)).hexdigest()[:16]
    return None if folder is None else folder / f"verified-{key}.json"
