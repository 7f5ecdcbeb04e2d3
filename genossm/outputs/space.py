"""Room on the disk, asked for before a write: neither pyBigWig nor HDF5 survives a write that fails half way.

pyBigWig 0.3.29 corrupts its memory and aborts the process, HDF5 cannot close the file any more; so a full disk has to be
seen beforehand to become a sentence.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from genossm.errors import FileError


def require_space(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Refuse to go on writing `path` where the file system has less than `needed_bytes` left.

    Raises:
        FileError: there is too little space.
    """
    free_bytes = shutil.disk_usage(Path(path).parent).free
    if free_bytes < needed_bytes:
        raise FileError(
            f"no space left on the disk for {path}: about {needed_bytes / 1e6:,.1f} MB are needed and "
            f"{free_bytes / 1e6:,.1f} MB are free; free some space or write elsewhere, then run the command again"
        )
