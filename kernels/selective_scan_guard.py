"""Whether a compiled selective-scan kernel laid its tensors out as its exchanges between threads take them to be.

The kernels pass numbers between the lanes of a warp by an instruction (`swap` in selective_scan_threads.py), which is right
where each element of a tensor's last axis lies in the thread of its number. The layout is Triton's choice, which other
versions may make otherwise; so it is read off the compiled kernel, and one that does not fit is compiled again without such
instructions (PLAIN), slower.
"""

from __future__ import annotations

import re

_LAYOUT = re.compile(r"^(#\w+) = (#ttg\.\w+<\{.*\}>)", re.MULTILINE)
_EXCHANGE = re.compile(r"shfl\.sync.*-> tensor<([\dx]+)xf32, (.*?)>(?: loc|$)", re.MULTILINE)
_SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (#\w+)\}")


def exchanges_fit(ttgir: str) -> bool:
    """Whether every tensor that passes between threads has one element of its last axis in each thread, in their order.

    Args:
        ttgir: Triton's GPU dialect of the kernel, as a compiled kernel's `asm["ttgir"]` has it.
    """
    layouts = dict(_LAYOUT.findall(ttgir))
    found = set(_EXCHANGE.findall(ttgir))
    if ttgir.count("shfl.sync") != len(_EXCHANGE.findall(ttgir)):
        return False
    return all(_by_thread(shape.split("x"), layout, layouts) for shape, layout in found)


def _by_thread(shape: list[str], layout: str, layouts: dict[str, str]) -> bool:
    sliced = _SLICE.match(layout)
    axis = len(shape) - 1
    if sliced:
        axis += int(sliced[1]) <= axis
        layout = sliced[2]
    text = layouts.get(layout, "")
    warps = int(shape[-1]) // 32
    if "ttg.blocked" in text:
        expected = {"sizePerThread": 1, "threadsPerWarp": 32, "warpsPerCTA": warps}
        return all(_numbers(text, name)[axis : axis + 1] == [number] for name, number in expected.items())
    if "ttg.linear" in text:
        along = [_bases(text, name, axis) for name in ("lane", "warp", "register")]
        thread = [1 << bit for bit in range(5 + warps.bit_length() - 1)]
        return along[0] + along[1] == thread and not any(along[2])
    return False


def _numbers(text: str, name: str) -> list[int]:
    match = re.search(name + r" = \[([\d, ]*)\]", text)
    return [int(number) for number in match[1].split(",")] if match else []


def _bases(text: str, name: str, axis: int) -> list[int]:
    """How far along the axis each bit of the lane's, warp's or register's number goes."""
    match = re.search(name + r" = \[((?:\[[\d, ]*\](?:, )?)*)\]", text)
    return [int(base.split(",")[axis]) for base in re.findall(r"\[([\d, ]+)\]", match[1])] if match else []
