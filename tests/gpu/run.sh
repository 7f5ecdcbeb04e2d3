#!/bin/sh
# Runs the tests that need a CUDA device, from anywhere, and prints pytest's summary. Exit status: pytest's.
# (pytest-benchmark warns where pytest-xdist runs, and warnings are errors here.)
# Compiling kernels takes most of the time: with pytest-xdist installed ${JOBS:-8} processes share it.
cd "$(dirname "$0")/../.." || exit 1
python="${PYTHON:-python3}"
if "$python" -c 'import xdist' 2>/dev/null; then
    exec "$python" -m pytest tests/gpu -m gpu -p no:benchmark -n "${JOBS:-8}" --dist loadgroup "$@"
fi
exec "$python" -m pytest tests/gpu -m gpu "$@"
