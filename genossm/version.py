"""Versions of genossm and what it stands on, for the record beside every output."""

from __future__ import annotations

import platform
from importlib import metadata

from genossm import __version__

PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "torchmetrics",
    "numpy",
    "pandas",
    "h5py",
    "pybigtools",
    "pyBigWig",
    "pyfaidx",
    "pyranges",
    "biopython",
)


def versions() -> dict[str, str]:
    """Version of genossm, Python and the packages results depend on; packages that are not installed are left out."""
    found = {"genossm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
