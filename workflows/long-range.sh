#!/bin/sh
# Does a model use what stands far away? On a simulated genome a promoter is open only if an enhancer stands 10-60 kb from
# it. Each CONFIG is trained on 131,072-bp windows, the first one also on 4,096-bp windows, and both are scored at the
# promoters of held-out chromosomes, half of which are open: AUPRC 0.5 is chance.
#
#   workflows/long-range.sh OUT [DEVICE] [CONFIG...]
#
# OUT     folder for everything that is made
# DEVICE  auto, cuda, cuda:N or cpu (default: auto, which takes CUDA)
# CONFIG  training configurations, by name or path (default: accessibility-100kb)
#
# From the environment: CHROMOSOMES (24) of CHROMOSOME_BP (4000000) each; BATCH (8), windows of a step, 32 times as many of
# the short ones, so that a step has the same bases; SEEDS (1); JOBS (1), trainings at once; OPTIONS, more options for both
# comparisons, such as "--set train.epochs=40".
#
# Run again after it was killed, it goes on where it stopped. genossm must be on the PATH, or in .venv of the checkout.
set -eu

if [ $# -lt 1 ]; then
  sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
device=${2:-auto}
shift
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- accessibility-100kb
chromosomes=${CHROMOSOMES:-24}
batch=${BATCH:-8}
seeds=${SEEDS:-1}
jobs=${JOBS:-1}

checkout=$(cd "$(dirname "$0")/.." && pwd)
[ ! -d "$checkout/.venv/bin" ] || PATH=$checkout/.venv/bin:$PATH

genossm simulate -o "$out/simulation" --no-signal \
  --chromosomes "$chromosomes" --chromosome-bp "${CHROMOSOME_BP:-4000000}"
# One validation chromosome is enough; the test split is the last sixth. The margin lets a scored promoter see almost 60 kb
# on either side; training may crop less, for more promoters in a window.
held=$((chromosomes / 6 > 1 ? chromosomes / 6 : 1))
prepare() {
  genossm prepare "$out/simulation/dataset.yaml" -o "$1" --set "split.valid=[chr$((chromosomes - held))]" \
    --set "window.length=$2" --set "window.margin=$3"
}
prepare "$out/dataset-131kb" 131072 57344
prepare "$out/dataset-4kb" 4096 1024

status=0
run() {
  name=$1 window=$2 margin=$3 windows=$4
  shift 4
  echo "windows of $window bp:"
  # shellcheck disable=SC2086 # OPTIONS is a list of words
  genossm compare "$@" --dataset "$out/dataset-$name" -o "$out/compare-$name" --sites "$out/simulation/truth.tsv" \
    --set "train.window_bp=$window" --set "train.margin_bp=$margin" --set train.windows_per_epoch=null \
    --set "train.batch_size=$windows" --seeds "$seeds" --jobs "$jobs" --device "$device" ${OPTIONS:-} || status=1
}
run 131kb 131072 32768 "$batch" "$@"
run 4kb 4096 1024 $((32 * batch)) "$1"
exit $status
