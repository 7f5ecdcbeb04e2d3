#!/bin/bash
# Try the batch jobs and the Snakefile on a Slurm of this machine's own, on the processor; it takes a few minutes.
# `make test-slurm` calls it with all that it needs.
#
#   [SLURM_LOCAL=/path/to/slurm-local.sh] [GENOSSM_SNAKEMAKE=/path/to/snakemake] workflows/test-slurm.sh [PYTEST OPTIONS]
#
# SLURM_LOCAL        a script that starts and stops a Slurm: called with start, then with stop. Without it, a Slurm that
#                    runs already is used: never call this on a cluster that others use, as all its jobs are waited for.
# GENOSSM_SNAKEMAKE  snakemake (with snakemake-executor-plugin-slurm), where it is not on the PATH; without one the
#                    Snakefile is not tried.
#
# pytest and genossm must be those of the `python` on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

cancel_and_stop() {
  # Jobs that a failed test left would outlive the daemons, and those that wait would run at the next start.
  scancel --user "$(id -un)" || true
  for _ in {1..30}; do
    [ -n "$(squeue --noheader)" ] || break
    sleep 0.5
  done
  "$SLURM_LOCAL" stop
}

if [ -n "${SLURM_LOCAL:-}" ]; then
  unset SLURM_CONF # it could name a cluster that others use
  trap '"$SLURM_LOCAL" stop' EXIT
  "$SLURM_LOCAL" start
  trap cancel_and_stop EXIT
fi
GENOSSM_TEST_SLURM=1 python -m pytest -q tests/test_workflows.py "$@"
