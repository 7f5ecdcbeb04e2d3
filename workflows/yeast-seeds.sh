#!/bin/sh
# Several seeds of one configuration on the real yeast data: train, score at 200 bp, mean and spread, and their ensemble.
#
#   GENOSSM_REALDATA=/path/to/realdata workflows/yeast-seeds.sh OUT [CONFIG] [DEVICE] [SEEDS]
#
# OUT     folder for everything that is made
# CONFIG  training configuration, by name or path (default: yeast-100kb)
# DEVICE  auto, cuda, cuda:N or cpu (default: auto, which takes CUDA)
# SEEDS   how many, from 1 (default: 3)
#
# A seed whose scores are there is not trained again. genossm must be on the PATH, or in .venv of the checkout.
set -eu

if [ $# -lt 1 ] || [ $# -gt 4 ] || [ -z "${GENOSSM_REALDATA:-}" ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
config=${2:-yeast-100kb}
device=${3:-auto}
seeds=${4:-3}

GENOSSM_REALDATA=$(cd "$GENOSSM_REALDATA" && pwd)
export GENOSSM_REALDATA
checkout=$(cd "$(dirname "$0")/.." && pwd)
[ ! -d "$checkout/.venv/bin" ] || PATH=$checkout/.venv/bin:$PATH

genossm prepare "$checkout/configs/yeast-dataset.yaml" -o "$out/dataset"
runs=
seed=1
while [ "$seed" -le "$seeds" ]; do
  run=$out/seed$seed
  runs="$runs $run"
  if [ ! -f "$run/test/metrics.tsv" ]; then
    resume=
    [ ! -d "$run" ] || resume=--resume
    genossm train "$config" --dataset "$out/dataset" -o "$run" --device "$device" --seed "$seed" $resume
    genossm evaluate "$run" --dataset "$out/dataset" --resolution 200 --device "$device" -o "$run/test"
  fi
  seed=$((seed + 1))
done

echo "test AUPRC of 200-bp bins, $seeds seeds: mean, standard deviation, each"
for track in atac_peaks atac_regions; do
  for run in $runs; do
    awk -F '\t' -v track="$track" '
      NR == 1 { for (i = 1; i <= NF; i++) if ($i == "auprc") column = i }
      $1 == track { print $column }' "$run/test/metrics.tsv"
  done | awk -v track="$track" '
    { each = each sprintf(" %.4f", $1); sum += $1; squares += $1 * $1 }
    END {
      mean = sum / NR
      spread = NR > 1 ? sqrt((squares - NR * mean * mean) / (NR - 1)) : 0
      printf "%-14s %.4f  %.4f  %s\n", track, mean, spread, each
    }'
done
echo "the seeds averaged:"
# shellcheck disable=SC2086 # a list of folders
genossm evaluate $runs --dataset "$out/dataset" --resolution 200 --device "$device"
