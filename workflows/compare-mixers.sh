#!/bin/sh
# Every mixer on the real yeast data, at about equal size: train all configurations with all seeds, score at 200 bp.
#
#   GENOSSM_REALDATA=/path/to/realdata workflows/compare-mixers.sh OUT [DEVICE] [SEEDS] [JOBS]
#
# OUT     folder for everything that is made
# DEVICE  auto, cuda, cuda:N or cpu (default: auto, which takes CUDA)
# SEEDS   which (default: 1,2,3)
# JOBS    trainings at once on that device (default: 1)
#
# Run again after it was killed, it goes on where it stopped. genossm must be on the PATH, or in .venv of the checkout.
set -eu

if [ $# -lt 1 ] || [ $# -gt 4 ] || [ -z "${GENOSSM_REALDATA:-}" ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
device=${2:-auto}
seeds=${3:-1,2,3}
jobs=${4:-1}

GENOSSM_REALDATA=$(cd "$GENOSSM_REALDATA" && pwd)
export GENOSSM_REALDATA
checkout=$(cd "$(dirname "$0")/.." && pwd)
[ ! -d "$checkout/.venv/bin" ] || PATH=$checkout/.venv/bin:$PATH

set -- hybrid
for file in "$checkout"/configs/yeast-*.yaml; do
  name=$(basename "$file" .yaml)
  case $name in
    yeast-dataset | yeast-cpu) ;; # no configuration of a training, another size
    *) set -- "$@" "$name" ;;
  esac
done

genossm prepare "$checkout/configs/yeast-dataset.yaml" -o "$out/dataset"
genossm compare "$@" --dataset "$out/dataset" -o "$out/compare" --seeds "$seeds" --resolution 200 \
  --jobs "$jobs" --device "$device"
