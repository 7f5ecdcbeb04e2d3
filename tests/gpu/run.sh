#!/bin/sh
# Runs the tests that need a CUDA device, from anywhere, and prints pytest's summary. Exit status: pytest's.
cd "$(dirname "$0")/../.." || exit 1
exec "${PYTHON:-python3}" -m pytest tests/gpu -m gpu "$@"
