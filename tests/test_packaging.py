"""The build map: every folder with code is a package, each link points home, wheel and sdist are complete."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import genossm

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "pipelines", "configs", "data")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = SETTINGS["tool"]["setuptools"]


def source_files() -> dict[str, Path]:
    """Every file that a wheel must hold: name inside the wheel -> path in the checkout."""
    patterns = {"genossm": ["py.typed"], "configs": ["*.yaml"], "data": []}
    patterns["data"] = SETUPTOOLS["package-data"]["genossm.data"]
    files: dict[str, Path] = {}
    for top in ("genossm", *LINKED):
        prefix = "" if top == "genossm" else "genossm/"
        for pattern in ("*.py", *patterns.get(top, [])):
            # Python 3.12's and older rglob do not follow the links inside genossm/.
            for path in (ROOT / top).rglob(pattern):
                if path.resolve() == path:
                    files[prefix + path.relative_to(ROOT).as_posix()] = path
    return files


@pytest.mark.parametrize("name", LINKED)
def test_links_point_to_their_folders(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked sdist has no links")
    link = ROOT / "genossm" / name
    assert link.is_symlink(), f"genossm/{name} must be a link to ../{name}"
    assert str(link.readlink()) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists(), "see STYLE: it would shadow another project's package"


def test_packages_list_every_folder_with_files() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in source_files()}
    assert folders <= set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("name", ("configs", "data"))
def test_data_folders_are_flat_and_wholly_shipped(name: str) -> None:
    shipped = {path.name for path in source_files().values() if path.parent == ROOT / name}
    present = {path.name for path in (ROOT / name).iterdir() if not path.name.startswith((".", "__"))}
    assert present - shipped == {"README.md"}


def test_every_top_folder_has_a_readme() -> None:
    for name in (*LINKED, "tests", "workflows"):
        assert (ROOT / name / "README.md").is_file(), name


def test_constraints_pin_every_dependency() -> None:
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    extras = SETTINGS["project"]["optional-dependencies"]["dev"]
    for requirement in (*SETTINGS["project"]["dependencies"], *extras):
        name = requirement.split(">=")[0]
        assert name.lower() in pins, f"{name} is not pinned in constraints.txt"


def test_no_machine_or_registry_in_constraints() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or (line.count("==") == 1 and not {"/", "@", "+"} & set(line)), line


@pytest.mark.slow
def test_wheel_and_sdist_are_complete(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "demo"
    )
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=unwanted)
    # The sdist is built from the checkout and the wheel from the sdist, as a release does.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(checkout)],
        check=True,
        capture_output=True,
        text=True,
    )
    version = genossm.__version__
    wanted = source_files()

    with zipfile.ZipFile(tmp_path / "dist" / f"genossm-{version}-py3-none-any.whl") as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert held == set(wanted)
        for name, path in wanted.items():
            assert wheel.read(name) == path.read_bytes(), name
        entry_points = wheel.read(f"genossm-{version}.dist-info/entry_points.txt").decode()
        assert "genossm = genossm.cli:main" in entry_points
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())

    with tarfile.open(tmp_path / "dist" / f"genossm-{version}.tar.gz") as sdist:
        held = {name.removeprefix(f"genossm-{version}/") for name in sdist.getnames()}
    others = [
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
    ]
    others += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    others += [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    others += [path.relative_to(ROOT).as_posix() for path in wanted.values()]
    assert sorted(set(others) - held) == []
