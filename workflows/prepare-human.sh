#!/bin/sh
# What a genome of human size costs: simulate one with many sparse tracks, prepare it, train a few steps of a tiny model and
# validate it on a whole chromosome; print time, memory, disk.
#
#   workflows/prepare-human.sh OUT [GENOME_BP] [TRACKS] [SIGNALS] [JOBS]
#
# OUT        folder for everything that is made (3.1 Gb x 161 tracks: 8 GB)
# GENOME_BP  length of the genome (default: 3.1e9)
# TRACKS     how many tracks (default: 161), of which SIGNALS (default: 0) are bigWigs and the others peaks
# JOBS       processes that prepare (default: all cores, at most 8)
#
# DEVICE from the environment is where the training runs (default: cpu).
#
# Peak memory is that of the largest process, and the most that all of them held together (proportional set size,
# which counts shared pages once), sampled four times a second. genossm must be on the PATH, or in .venv of the checkout.
set -eu

if [ $# -lt 1 ] || [ $# -gt 5 ]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
bases=${2:-3.1e9}
tracks=${3:-161}
signals=${4:-0}
jobs=${5:-}

checkout=$(cd "$(dirname "$0")/.." && pwd)
[ ! -d "$checkout/.venv/bin" ] || PATH=$checkout/.venv/bin:$PATH
mkdir -p "$out"

# Seconds, largest process in MB and all processes together in MB, of one command.
measure() {
  python3 - "$@" <<'PYTHON'
import os, resource, subprocess, sys, time

def memory_kb(process):
    """Proportional set size of a process and all below it."""
    total, waiting = 0, [process]
    while waiting:
        here = waiting.pop()
        try:
            with open(f"/proc/{here}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
            for thread in os.listdir(f"/proc/{here}/task"):
                with open(f"/proc/{here}/task/{thread}/children") as file:
                    waiting += map(int, file.read().split())
        except (OSError, StopIteration):
            pass  # it has ended meanwhile
    return total

start, together = time.monotonic(), 0
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
while process.poll() is None:
    together = max(together, memory_kb(process.pid))
    time.sleep(0.25)
if process.returncode:
    sys.exit(process.returncode)
largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(f"{time.monotonic() - start:.0f} s, largest process {largest / 1024:,.0f} MB, all together {together / 1024:,.0f} MB")
PYTHON
}

echo "simulate: $(measure genossm simulate --sparse --genome-bp "$bases" --tracks "$tracks" --signals "$signals" --margin 16384 -o "$out/genome")"
echo "expected: $(genossm prepare "$out/genome/dataset.yaml" -o "$out/dataset" ${jobs:+--jobs "$jobs"} --dry-run)"
echo "prepare: $(measure genossm prepare "$out/genome/dataset.yaml" -o "$out/dataset" ${jobs:+--jobs "$jobs"})"
echo "again: $(measure genossm prepare "$out/genome/dataset.yaml" -o "$out/dataset" ${jobs:+--jobs "$jobs"})"
du -sh "$out/genome" "$out/dataset"
python3 -c "
import sys, time
import numpy as np
from genossm.dataset import PreparedDataset
data = PreparedDataset(sys.argv[1])
windows = data.windows('train')
bins = (data.window_bp - 2 * data.margin_bp) // data.bin_bp
random, seconds = np.random.default_rng(0), []
for window in random.choice(len(windows), 500):
    chrom = windows[window].chrom
    first = int(random.integers(0, max(1, data.bins(chrom) - bins)))
    last = min(first + bins, data.bins(chrom))
    start = time.perf_counter()
    data.targets(chrom, first, last), data.mask(chrom, first, last)
    seconds.append(time.perf_counter() - start)
print(f'read: targets and mask of {bins} bins x {len(data.tracks)} tracks: median of {1 / np.median(seconds):,.0f} windows/s')
" "$out/dataset"
python3 -c "
import sys, time
start = time.perf_counter()
import genossm as gs
loader = gs.WindowLoader(gs.WindowDataset(sys.argv[1], 'train', augment=True), batch_size=8, workers=2)
next(iter(loader))
print(f'first batch of 8 windows: after {time.perf_counter() - start:.1f} s, imports included')
" "$out/dataset"
rm -rf "$out/run"
echo "train: $(measure genossm train tiny --dataset "$out/dataset" -o "$out/run" --device "${DEVICE:-cpu}" \
  --set train.window_bp=131072 --set train.margin_bp=16384 --set train.epochs=1 --set train.windows_per_epoch=32)"
