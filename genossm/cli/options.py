"""Options that several commands share, so that they are spelled, checked and explained alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    TextType = click.ParamType[str]
else:
    TextType = click.ParamType  # generic for type checkers only in the older click that is allowed too

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]


class DeviceName(TextType):
    """A compute device by name: auto, cpu, cuda or cuda:N. Whether it is there is for pick_device to say."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value` in lower case; bad usage when it names no device."""
        name = str(value).lower()
        if re.fullmatch(r"auto|cpu|cuda|cuda:\d+", name) is None:
            self.fail(f"{value!r} is no device: use auto, cuda, cuda:N (N = 0, 1, ...) or cpu", param, ctx)
        return name


class Override(TextType):
    """One `a.b=value` that replaces a key of a YAML file. Whether the key exists is for the config to say."""

    name = "a.b=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value` unchanged; bad usage when it is not key=value."""
        text = str(value)
        if re.fullmatch(r"[^\s=.]+(\.[^\s=.]+)*=.*", text, flags=re.DOTALL) is None:
            self.fail(f"{value!r} is no override: write key=value or section.key=value", param, ctx)
        return text


def out_option(
    *, help: str = "Folder to write into; made when missing.", required: bool = True
) -> Decorator[Any]:
    """`-o/--out DIR`, given to the command as `out: Path` (None where it is not required and absent)."""
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("-o", "--out", type=folder, required=required, metavar="DIR", help=help)


def set_option(*, help: str = "Replace a key of the YAML file; may be given often.") -> Decorator[Any]:
    """`--set a.b=value`, any number of times, given to the command as `overrides: tuple[str, ...]`."""
    return click.option("--set", "overrides", type=Override(), multiple=True, metavar="A.B=VALUE", help=help)


def device_option(*, default: str = "auto") -> Decorator[Any]:
    """`--device auto|cuda|cuda:N|cpu`, given to the command as `device: str`."""
    return click.option(
        "--device",
        type=DeviceName(),
        default=default,
        show_default=True,
        metavar="auto|cuda|cuda:N|cpu",
        help="Where to compute. auto takes CUDA and stops when there is none; cpu only when asked for.",
    )


def batch_size_option(*, default: int = 4) -> Decorator[Any]:
    """`--batch-size N` (at least 1), given to the command as `batch_size: int`."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="N",
        help="Windows computed at once; changes speed and memory, and results by rounding only.",
    )


def seed_option(*, default: int | None = 1) -> Decorator[Any]:
    """`--seed N` (0 to 2**32 - 1), given to the command as `seed: int`, or None where that is the default."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**32 - 1),
        default=default,
        show_default=default is not None,
        metavar="N",
        help="Seed of everything random.",
    )
