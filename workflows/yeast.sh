#!/bin/sh
# The whole path on real yeast data: check, prepare, train, evaluate, predict.
#
#   GENOSSM_REALDATA=/path/to/realdata workflows/yeast.sh OUT [CONFIG] [DEVICE]
#
# OUT     folder for everything that is made
# CONFIG  training configuration, by name or path (default: yeast-100kb; yeast-cpu for a machine without a GPU)
# DEVICE  auto, cuda, cuda:N or cpu (default: auto, which takes CUDA)
#
# Run again after it was killed, it goes on where it stopped. genossm must be on the PATH, or in .venv of the checkout.
set -eu

if [ $# -lt 1 ] || [ $# -gt 3 ] || [ -z "${GENOSSM_REALDATA:-}" ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
config=${2:-yeast-100kb}
device=${3:-auto}

GENOSSM_REALDATA=$(cd "$GENOSSM_REALDATA" && pwd)
export GENOSSM_REALDATA
genome=$GENOSSM_REALDATA/sacCer3/sacCer3.fa.gz
if [ ! -f "$genome" ]; then
  echo "error: no $genome: GENOSSM_REALDATA must name the folder that holds sacCer3/" >&2
  exit 1
fi

checkout=$(cd "$(dirname "$0")/.." && pwd)
[ ! -d "$checkout/.venv/bin" ] || PATH=$checkout/.venv/bin:$PATH
dataset=$checkout/configs/yeast-dataset.yaml

genossm check "$dataset"
genossm prepare "$dataset" -o "$out/dataset"
if [ -d "$out/run" ]; then
  genossm train "$config" --dataset "$out/dataset" -o "$out/run" --device "$device" --resume
else
  genossm train "$config" --dataset "$out/dataset" -o "$out/run" --device "$device"
fi
genossm evaluate "$out/run" --dataset "$out/dataset" --resolution 200 --device "$device" -o "$out/test"
genossm predict "$out/run" --genome "$genome" --chrom chrIV --device "$device" -o "$out/predictions"
echo "done: scores in $out/test, bigWig files in $out/predictions"
