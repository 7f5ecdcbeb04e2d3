"""Starts the processes that time other people's kernels, collects what they write, and quotes what is absent."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

import genossm
from genossm.pipelines.benchmark_cases import Case, Shapes
from genossm.pipelines.benchmark_peers import PEERS, Request
from genossm.pipelines.benchmark_timing import Measured, Pass, describe_row
from genossm.progress import say

WARM_PROCESSES = {"mamba_ssm": 4, "fla": 2}
"""For each state size of ssd: these packages try many configurations, most of the time compiling them."""

QUOTED_FROM = "one NVIDIA H100 80GB, torch 2.11, Triton 3.6.0, bf16, measured earlier with the same method"
_NO_GRAPH: tuple[float | None, float | None] = (None, None)
# case and peer: length -> forward ms, with the gradient, and both as a CUDA graph; at 1,048,576 also the peak in GiB.
QUOTED: dict[tuple[str, str], dict[int, tuple[float, ...]]] = {
    ("ssd-both-128", "mamba-ssm, two + flips"): {
        8192: (2.15, 9.37, 0.25, 1.21),
        131072: (4.39, 16.3),
        1048576: (34.3, 126, 19.5),
    },
    ("ssd-both-64", "mamba-ssm, two + flips"): {
        8192: (1.92, 9.85, 0.22, 1.04),
        131072: (3.57, 13.5),
        1048576: (28.2, 104, 17.5),
    },
    ("ssd-forward-128", "mamba-ssm"): {
        8192: (0.93, 5.24, 0.10, 0.53),
        131072: (1.69, 7.08),
        1048576: (13.2, 54.6, 10.9),
    },
    ("ssd-forward-64", "mamba-ssm"): {
        8192: (0.53, 3.88, 0.08, 0.45),
        131072: (1.30, 5.71),
        1048576: (10.3, 44.3, 9.2),
    },
    ("ssd-forward-128", "fla simple_gla, q and k a head"): {
        8192: (0.34, 2.00, 0.12, 0.49),
        131072: (1.69, 7.37),
        1048576: (13.2, 59.0, 28.1),
    },
    ("selective_scan-both-shared", "mamba-ssm, two + flips"): {
        8192: (0.41, 2.02),
        131072: (6.75, 30.6),
        1048576: (54.1, 247, 12.4),
    },
    ("selective_scan-both-separate", "mamba-ssm, two + flips"): {
        8192: (0.41, 2.02),
        131072: (6.75, 30.6),
        1048576: (54.1, 247, 12.4),
    },
    ("selective_scan-forward", "mamba-ssm"): {
        8192: (0.17, 0.98),
        131072: (2.78, 13.9),
        1048576: (22.1, 112, 6.3),
    },
    # Twice what one direction takes.
    ("short_conv-both", "causal-conv1d, two, no flips"): {
        8192: (0.22, 1.12),
        131072: (0.44, 1.04),
        1048576: (3.32, 7.84),
    },
}


@dataclass
class Peers:
    """What was found beside us: versions by package, rows, and why a package is absent."""

    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Measured] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


class PeerProcesses:
    """Warms and runs the peers that fit some of the cases. A context manager: leaving it ends what still runs."""

    def __init__(
        self,
        cases: Sequence[Case],
        shapes: Shapes,
        lengths: dict[str, list[int]],
        device: torch.device,
        dtype: torch.dtype,
        *,
        budget_s: float,
        host_bound_below: int,
        warm_limit_s: float,
        limit_s: float,
    ) -> None:
        self.cases = [case for case in cases if any(peer.fits(case) for peer in PEERS)]
        self.lengths = lengths
        self.warm_limit_s = warm_limit_s
        self.limit_s = limit_s
        self.plain = Request(
            "",
            "",
            [],
            dataclasses.asdict(shapes),
            {},
            str(device),
            str(dtype).removeprefix("torch."),
            budget_s,
            host_bound_below,
        )
        self._stack = ExitStack()
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> PeerProcesses:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.callback(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def warm(self) -> None:
        """Start compiling the configurations that the peers' autotuners will try, many processes at once."""
        sizes = {case.state: case for case in self.cases if case.operator == "ssd"}
        for package, processes in WARM_PROCESSES.items():
            for case in sizes.values():
                if not any(peer.package == package and peer.fits(case) for peer in PEERS):
                    case = dataclasses.replace(case, direction="forward")
                lengths = {case.name: [min(self.lengths[case.name])]}
                for index in range(processes):
                    self._start(package, "ssd", [case], lengths, (index, processes))

    def wait(self) -> None:
        """Wait until nothing runs beside what is timed."""
        ends = time.monotonic() + self.warm_limit_s
        for process in self._running:
            try:
                process.wait(max(1.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                say("a peer's warm-up took too long and was ended; what is left is compiled when it is timed")
                process.kill()
                process.wait()
        self._running.clear()

    def run(self) -> Peers:
        """Time one package and operator after the other; what does not fit into the time limit is left out."""
        found = Peers()
        ends = time.monotonic() + self.limit_s
        for package, operator in dict.fromkeys((peer.package, peer.operator) for peer in PEERS):
            peers = [peer for peer in PEERS if (peer.package, peer.operator) == (package, operator)]
            cases = [case for case in self.cases if any(peer.fits(case) for peer in peers)]
            if not cases:
                continue
            lengths = {case.name: self.lengths[case.name] for case in cases}
            process, results, log = self._start(package, operator, cases, lengths)
            trouble = ""
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                trouble = f"ended when the {self.limit_s:.0f} s for all peers were over"
            self._running.remove(process)
            if process.returncode and not trouble:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                trouble = f"its process ended with {process.returncode}: {''.join(last)}"[:300]
            self._collect(found, package, operator, results, trouble)
        found.rows += quoted(self.cases, self.lengths, found.rows)
        return found

    def _start(
        self,
        package: str,
        operator: str,
        cases: Sequence[Case],
        lengths: dict[str, list[int]],
        warm_slice: tuple[int, int] | None = None,
    ) -> tuple[subprocess.Popen[bytes], Path, Path]:
        number = len(list(self.folder.iterdir()))
        request, results, log = (self.folder / f"{number}.{end}" for end in ("json", "jsonl", "log"))
        asked = dataclasses.replace(
            self.plain,
            package=package,
            operator=operator,
            cases=[dataclasses.asdict(case) for case in cases],
            lengths=lengths,
            warm_slice=warm_slice,
        )
        request.write_text(json.dumps(dataclasses.asdict(asked)))
        results.touch()
        # The same genossm as here, whatever else is installed.
        home = str(Path(genossm.__file__).resolve().parents[1])
        paths = [home, *(path for path in [os.environ.get("PYTHONPATH")] if path)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "genossm.pipelines.benchmark_peers", str(request), str(results)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._running.append(process)
        return process, results, log

    def _collect(self, found: Peers, package: str, operator: str, results: Path, trouble: str) -> None:
        for line in results.read_text().splitlines():
            entry = json.loads(line)
            if "version" in entry:
                found.versions[package] = entry["version"]
            elif "absent" in entry:
                found.absent[f"{package} ({operator})"] = entry["absent"]
            else:
                found.rows.append(_measured(entry["row"]))
                say(describe_row(found.rows[-1]))
        if trouble:
            found.absent[f"{package} ({operator})"] = trouble
        word = found.absent.get(f"{package} ({operator})", "timed")
        say(f"{package} {found.versions.get(package, '')} ({operator}): {word}")

    def _end(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


def quoted(cases: Sequence[Case], lengths: dict[str, list[int]], rows: Sequence[Measured]) -> list[Measured]:
    """Earlier figures of another card for peers that were not measured here, marked as quoted."""
    measured = {(row.case, row.by) for row in rows if row.forward is not None}
    found = []
    for (name, label), figures in QUOTED.items():
        if (name, label) in measured or name not in {case.name for case in cases}:
            continue
        for length, figure in figures.items():
            if length not in lengths[name]:
                continue
            graph = (figure[2], figure[3]) if len(figure) == 4 else _NO_GRAPH
            peak_mib = figure[2] * 1024 if len(figure) == 3 else None
            found.append(
                Measured(
                    name,
                    length,
                    label,
                    Pass(figure[0], 0, None, graph[0]),
                    Pass(figure[1], 0, peak_mib, graph[1]),
                    quoted=True,
                )
            )
    return found


def _measured(row: dict[str, object]) -> Measured:
    passes = {
        name: Pass(**value) if isinstance(value, dict) else None
        for name, value in row.items()
        if name in ("forward", "forward_backward")
    }
    return dataclasses.replace(Measured(**row), **passes)  # type: ignore[arg-type]
