"""The folder that `fetch` fills: its manifest, and the tracks.tsv and dataset.yaml that describe what is in it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from genossm import __version__
from genossm.atomic import atomic_write_text
from genossm.config import dump_yaml
from genossm.download import Downloaded
from genossm.errors import FileError
from genossm.lock import only_one
from genossm.progress import say

MANIFEST = "manifest.json"


class Manifest:
    """What was fetched into a folder: address, md5, size and date of each file, written again after each change.

    `files` maps a file's name to its record; `written` maps the files that `fetch` made itself to their sha256.
    """

    def __init__(self, folder: Path) -> None:
        """Read the manifest of `folder`, empty where it has none.

        Raises:
            FileError: there is one that cannot be read.
        """
        self.path = folder / MANIFEST
        self.files: dict[str, dict[str, Any]] = {}
        self.written: dict[str, str] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_bytes())
            self.files = {str(name): dict(record) for name, record in content["files"].items()}
            self.written = {str(name): str(sha256) for name, sha256 in content["written"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                f"{self.path} is no manifest of `genossm fetch`, or is damaged; move it away: files that the server "
                "gives an md5 for are then found by it"
            ) from error

    def local_md5(self, name: str, url: str) -> str | None:
        """The md5 that a file had when it was fetched from `url`."""
        record = self.files.get(name, {})
        return str(record["md5"]) if record.get("url") == url and "md5" in record else None

    def record(self, downloaded: Downloaded, about: Mapping[str, str]) -> None:
        """Note a complete file; the date of one that was there already stays."""
        file = downloaded.file
        before = self.files.get(file.name, {})
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.files[file.name] = {
            "url": file.url,
            "md5": downloaded.md5,
            "md5_checked": file.md5 is not None,
            "size": downloaded.size,
            "date": now if downloaded.fetched else before.get("date", now),
            **about,
        }
        self.save()

    def save(self) -> None:
        """Write it."""
        content = {"genossm": __version__, "files": self.files, "written": self.written}
        atomic_write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> bool:
        """Write a text file beside the manifest, unless someone has edited the one that is there; True if written."""
        path = self.path.with_name(name)
        ours = (self.written.get(name), _sha256(text.encode()))
        if path.exists() and _sha256(path.read_bytes()) not in ours:
            say(f"{path} was made or edited by hand and stays as it is; remove it to have it written")
            return False
        atomic_write_text(path, text)
        self.written[name] = _sha256(text.encode())
        self.save()
        return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make `folder` where it is missing, and hold it for one fetch at a time; a second one waits.

    Raises:
        FileError: the folder cannot be made.
    """

    def waiting() -> None:
        say(f"waiting for another `genossm fetch` in {folder} to end")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder} ({error.strerror}); choose another") from error
    with only_one(folder / ".fetch.lock", waiting=waiting):
        yield


def tracks_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The text of a tracks.tsv: a header, then a line for each track; all rows have the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def dataset_description(
    *, assembly: str, genome: str, exclude: Sequence[str], valid: Sequence[str], test: Sequence[str]
) -> str:
    """The text of a dataset.yaml for the tracks.tsv beside it, with the default windows."""
    mapping = {
        "assembly": assembly,
        "genome": genome,
        "exclude": list(exclude),
        "tracks": "tracks.tsv",
        "window": {"length": 131_072, "margin": 16_384, "bin": 32},
        "split": {"valid": list(valid), "test": list(test)},
    }
    return (
        "# Written by `genossm fetch encode`; an edited file is left alone. Next: genossm check, then genossm prepare.\n"
        + dump_yaml(mapping)
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
