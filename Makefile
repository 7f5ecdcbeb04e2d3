# The three things to do in a checkout: make demo, make test, make lint. All use .venv, made on first need.

VENV := .venv
BIN := $(VENV)/bin
# Tests run side by side, one process a core; more threads in each would only get in each other's way.
TEST_PROCESSES ?= 2
TEST_THREADS ?= 1
PYTEST_FLAGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help:
	@echo "make demo   simulate a genome, train, evaluate, predict; writes demo/report.html (CPU, minutes)"
	@echo "make test   run the tests (CPU)"
	@echo "make lint   ruff check, ruff format --check, mypy"
	@echo "make clean  remove .venv, the demo and caches"

demo: $(VENV)/.installed
	$(BIN)/genossm demo -o demo --device cpu
	@echo "The page is at $(CURDIR)/demo/report.html"

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) \
	  $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

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
