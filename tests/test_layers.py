"""Imports go one way, from the genome side up to the command line; read from the source, functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "pipelines", "configs", "data")

# Each layer and the layers it may import beside itself. A module that is in no layer fails the test:
# give it a place here when you add it.
LAYERS: dict[str, tuple[str, ...]] = {
    "foundation": (),
    "genome": ("foundation",),
    "dataset": ("foundation", "genome"),
    "kernels": ("foundation",),
    "models": ("foundation", "kernels"),
    "measures": ("foundation",),
    "checkpoint": ("foundation", "genome", "dataset", "kernels", "models", "measures"),
    "outputs": ("foundation", "genome", "dataset", "measures"),
    "pipelines": (
        "foundation",
        "genome",
        "dataset",
        "kernels",
        "models",
        "measures",
        "checkpoint",
        "outputs",
    ),
    "cli": (
        "foundation",
        "genome",
        "dataset",
        "kernels",
        "models",
        "measures",
        "checkpoint",
        "outputs",
        "pipelines",
    ),
}
MODULES = {
    "errors": "foundation",
    "progress": "foundation",
    "atomic": "foundation",
    "version": "foundation",
    "hdf5_file": "foundation",
    "device_lock": "foundation",
    "file_reader": "foundation",
    "lock": "foundation",
    "amounts": "foundation",
    "scaling": "foundation",
    "storage": "foundation",
    "config": "foundation",
    "interval": "foundation",
    "sequence": "foundation",
    "strands": "foundation",
    "web": "foundation",
    "download": "foundation",
    "encode_portal": "foundation",
    "cache_file": "genome",
    "chrom_names": "genome",
    "compressed": "genome",
    "genome": "genome",
    "annotations": "genome",
    "cut_sites": "genome",
    "external_sort": "foundation",
    "fragments": "genome",
    "homology": "genome",
    "samples": "genome",
    "splits": "foundation",
    "tracks_table": "dataset",
    "twobit": "genome",
    "signal": "genome",
    "windows": "genome",
    "dataset_config": "dataset",
    "dataset_inputs": "dataset",
    "input_files": "dataset",
    "targets": "dataset",
    "dataset": "dataset",
    "verified": "dataset",
    "loaders": "dataset",
    "data_module": "dataset",
    "device_data": "dataset",
    "device_genome": "dataset",
    "stream_loader": "dataset",
    "code_reader": "dataset",
    "tiles": "dataset",
    "packed": "dataset",
    "sampling": "dataset",
    "kernels": "kernels",
    "models": "models",
    "metrics": "measures",
    "ranking": "measures",
    "rebin": "measures",
    "run_config": "checkpoint",
    "checkpoint": "checkpoint",
    "outputs": "outputs",
    "pipelines": "pipelines",
    "cli": "cli",
}


def layer_of(module: str) -> str | None:
    """The layer of a dotted module name, None for the package itself (`genossm`) and unknown ones."""
    parts = module.split(".")
    return MODULES.get(parts[1]) if parts[0] == "genossm" and len(parts) > 1 else None


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    """Every module that `source` imports, wherever it stands: (line, full dotted name).

    `from a import b` gives both a and a.b, since b may be a module. `if TYPE_CHECKING:` counts: a type is
    knowledge of an upper layer as well. So do import_module("...") and __import__("...") of plain strings.
    """
    found: list[tuple[int, str]] = []
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(node.lineno, base), *((node.lineno, f"{base}.{name.name}") for name in node.names)]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def offences(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, a sentence each."""
    own = layer_of(module)
    wrong: list[str] = []
    for line, target in imports_of(source, module, is_package=is_package):
        if target.split(".")[0] in LINKED:
            wrong.append(f"{module}:{line} imports {target}: write genossm.{target}")
            continue
        layer = layer_of(target)
        if own is not None and layer is not None and layer != own and layer not in LAYERS[own]:
            wrong.append(f"{module}:{line} ({own}) imports {target} ({layer}): imports go one way")
    return sorted(set(wrong))


def modules() -> list[tuple[str, Path]]:
    """Every module of genossm, the linked folders included: (dotted name, path)."""
    found = []
    for top in ("genossm", "kernels", "pipelines"):
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if top == "genossm" and inside.parts[1] in LINKED:
                continue
            name = ".".join(inside.with_suffix("").parts)
            found.append((name if top == "genossm" else f"genossm.{name}", path))
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_imports_go_one_way(module: str, path: Path) -> None:
    is_package = path.name == "__init__.py"
    dotted = module.removesuffix(".__init__")
    if dotted != "genossm":
        assert layer_of(dotted) is not None, (
            f"{dotted} is in no layer: add it to MODULES in tests/test_layers.py"
        )
        assert offences(path.read_text(), dotted, is_package=is_package) == []
    else:
        assert all(name.split(".")[0] not in LINKED for _, name in imports_of(path.read_text(), "genossm"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_tests_import_linked_folders_by_full_name(path: Path) -> None:
    assert [name for _, name in imports_of(path.read_text(), "tests") if name.split(".")[0] in LINKED] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("genossm.interval", "from genossm.genome import Genome"),
        ("genossm.genome", "import genossm.dataset"),
        ("genossm.windows", "def later():\n    from genossm.pipelines.train import train"),
        ("genossm.windows", "def later():\n    import genossm.cli.train"),
        ("genossm.dataset", "from genossm import checkpoint"),
        ("genossm.dataset", "from .models.encoder import Encoder"),
        ("genossm.models.encoder", "from ..pipelines import train"),
        (
            "genossm.models.encoder",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import genossm.dataset",
        ),
        ("genossm.kernels.ssd", "from genossm.models.encoder import Encoder"),
        ("genossm.metrics", "from importlib import import_module\nimport_module('genossm.cli')"),
        ("genossm.pipelines.train", "from genossm.cli.console import show"),
        ("genossm.models.encoder", "import kernels.ssd"),
        ("genossm.models.encoder", "def later():\n    from kernels import ssd"),
    ],
)
def test_an_upward_or_bare_import_is_found(module: str, source: str) -> None:
    assert len(offences(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("genossm.genome", "from genossm.sequence import encode\nfrom genossm import errors"),
        ("genossm.models.encoder", "from genossm.kernels.ssd import ssd"),
        ("genossm.pipelines.train", "from genossm.pipelines.device import pick_device\nimport torch"),
        ("genossm.cli.train", "from genossm.cli.options import out_option\nfrom genossm import __version__"),
        ("genossm.dataset", "from .genome import Genome"),
    ],
)
def test_a_downward_import_is_fine(module: str, source: str) -> None:
    assert offences(source, module) == []


def test_layers_hold_no_cycle() -> None:
    order = list(LAYERS)
    for layer, below in LAYERS.items():
        assert all(order.index(lower) < order.index(layer) for lower in below), layer
