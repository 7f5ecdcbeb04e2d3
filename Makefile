# What to do in a checkout: make demo, make test, make test-slurm, make lint. All use .venv, made on first need.

VENV := .venv
BIN := $(VENV)/bin
SNAKEMAKE := $(VENV)/snakemake
# Tests run side by side, one process a core; more threads in each would only get in each other's way.
TEST_PROCESSES ?= 2
TEST_THREADS ?= 1
PYTEST_FLAGS ?=
# A script that starts and stops a Slurm of this machine's own.
SLURM_LOCAL ?= ../shared/slurm-local.sh

.DELETE_ON_ERROR:
.PHONY: help demo test test-slurm lint clean

help:
	@echo "make demo   simulate a genome, train, evaluate, predict; writes demo/report.html (CPU, minutes)"
	@echo "make test   run the tests (CPU)"
	@echo "make test-slurm   start a Slurm here, run the tests of the batch jobs and the Snakefile on it (as root), stop it"
	@echo "make lint   ruff check, ruff format --check, mypy"
	@echo "make clean  remove .venv, the demo and caches"

demo: $(VENV)/.installed
	$(BIN)/genossm demo -o demo --device cpu
	@echo "The page is at $(CURDIR)/demo/report.html"

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) \
	  $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

# Where no Slurm can be started this says so and passes. Where one can, it must start, and the tests on it must pass.
ifneq ($(shell test -f "$(SLURM_LOCAL)" && echo found),found)
test-slurm:
	@echo "The Slurm tests were skipped: '$(SLURM_LOCAL)' (SLURM_LOCAL) is no script that starts a Slurm; see docs/slurm.md."
else ifneq ($(shell id -u),0)
test-slurm:
	@echo "The Slurm tests were skipped: only root can start a Slurm, and this is user $$(id -u); see docs/slurm.md."
else
test-slurm: $(VENV)/.installed-dev $(SNAKEMAKE)/.installed
	PATH="$(abspath $(BIN)):$$PATH" SLURM_LOCAL="$(SLURM_LOCAL)" GENOSSM_SNAKEMAKE="$(abspath $(SNAKEMAKE))/bin/snakemake" \
	  workflows/test-slurm.sh $(PYTEST_FLAGS)
endif

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Editable, so that the stamps go stale only when what must be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed

# An environment of its own: Snakemake and genossm ask for different versions of the same package.
$(SNAKEMAKE)/.installed: constraints-snakemake.txt | $(BIN)/python
	$(BIN)/python -m venv --clear $(SNAKEMAKE)
	$(SNAKEMAKE)/bin/python -m pip install -q -c constraints-snakemake.txt snakemake snakemake-executor-plugin-slurm
	@touch $@

CANDIDATES := $(strip $(PYTHON) python3.11 python3.12 python3)

# A name alone proves nothing (version managers leave shims that do not run): each candidate is started.
$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$($$python --version) ($$python)"; \
	    exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer with the venv module was found (tried $(CANDIDATES)):" \
	  "install Python 3.11 or 3.12, or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1
