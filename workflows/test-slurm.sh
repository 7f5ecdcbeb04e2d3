#!/bin/bash
# Try the batch jobs and the Snakefile on a Slurm of this machine's own, on the processor; it takes a few minutes.
#
#   [SLURM_LOCAL=/path/to/slurm-local.sh] [GENOSSM_SNAKEMAKE=/path/to/snakemake] workflows/test-slurm.sh
#
# SLURM_LOCAL        a script that starts and stops a Slurm: called with start, then with stop. Without it, a Slurm that
#                    runs already is used: never call this on a cluster that others use, as all its jobs are waited for.
# GENOSSM_SNAKEMAKE  snakemake (with snakemake-executor-plugin-slurm), where it is not on the PATH; without one the
#                    Snakefile is not tried.
#
# pytest and genossm must be those of the `python` on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${SLURM_LOCAL:-}" ]; then
  trap '"$SLURM_LOCAL" stop' EXIT
  "$SLURM_LOCAL" start
fi
GENOSSM_TEST_SLURM=1 python -m pytest -q tests/test_workflows.py "$@"
