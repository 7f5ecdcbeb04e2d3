"""One prediction on several devices of this machine: a process for each, with its share of the parts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from genossm.errors import ConfigError, DeviceError
from genossm.pipelines.parts import PredictionStopped
from genossm.pipelines.shards import Shard
from genossm.pipelines.stop import STOPPED_STATUS, stop_asked

POLL_S = 0.1


def spread(command: Sequence[str], devices: Sequence[str], shard: Shard | None) -> None:
    """Run `command` once for each device and wait until all shares, those of `shard` or of all, are there.

    A SIGTERM is passed on. When a process fails the others go on, so that a restart has less to do.

    Args:
        command: the words of a `genossm predict`.
        devices: names of devices.
        shard: what is divided; all by default.

    Raises:
        ConfigError: a model has no path that another process could load it from.
        PredictionStopped: SIGTERM came.
        DeviceError: a process failed.
    """
    if command[2] == "RUN":
        raise ConfigError(
            "several devices need models that other processes can load: give the paths of runs, not models in memory"
        )
    whole = shard or Shard(1, 1)
    first, count = (whole.index - 1) * len(devices) + 1, whole.count * len(devices)
    words = [sys.executable, "-m", "genossm.cli", *command[1:]]
    with stop_asked("the parts in hand") as stopped:
        jobs = [
            subprocess.Popen(
                [*words, "--device", device, "--shard", f"{first + number}/{count}"],
                stdout=subprocess.DEVNULL,
            )
            for number, device in enumerate(devices)
        ]
        try:
            told = False
            while any(job.poll() is None for job in jobs):
                time.sleep(POLL_S)
                if stopped() and not told:
                    told = True
                    for job in jobs:
                        job.terminate()
        except BaseException:
            for job in jobs:
                job.kill()
            raise
        finally:
            for job in jobs:
                job.wait()
    fine = {0, STOPPED_STATUS, -signal.SIGTERM} if stopped() else {0}  # the last: before it could take note
    failed = [
        f"{device} (exit status {job.returncode})"
        for device, job in zip(devices, jobs, strict=True)
        if job.returncode not in fine
    ]
    if failed:
        raise DeviceError(
            f"the prediction failed on {', '.join(failed)}, as told above; run the same command again to go on"
        )
    if stopped():
        raise PredictionStopped(
            "stopped after the parts in hand, as asked; run the same command again to go on"
        )
