# Every target sets itself up: a fresh machine needs Python 3.11+ and make, nothing else.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test chaos lint format bench fuzz clean

help:
	@echo "make demo    set up, start the embedded stack, raw images -> champion in the MLflow UI"
	@echo "make test    set up, run the tests"
	@echo "make chaos   training struck by lost workers, nodes, drivers: five moments of each kind (CHAOS_ROUNDS=5)"
	@echo "make lint    ruff (format and check) and mypy"
	@echo "make bench   every benchmark with its peers (make bench QUICK=--quick for a short run)"
	@echo "make fuzz    the decoders against hostile files, the C code with sanitizers (FUZZ_SECONDS=60 each)"
	@echo "make setup   only the set-up: $(VENV) with the project in it"

setup: $(VENV)/.core

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# The C extensions are built here, where a compiler is.
$(VENV)/.core: pyproject.toml setup.py constraints.txt $(wildcard pipelines/*/native/*.[ch]) | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/vit demo

# First what needs no server, on all cores; then what shares the one real stack. With PYTEST_ARGS either half may be empty.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 8 -m "not stack" --durations 15 $(PYTEST_ARGS) || [ $$? = 5 -a -n "$(PYTEST_ARGS)" ]
	$(BIN)/python -m pytest -m stack --durations 40 $(PYTEST_ARGS) || [ $$? = 5 -a -n "$(PYTEST_ARGS)" ]

chaos: $(VENV)/.dev
	VIT_CHAOS_ROUNDS=$(or $(CHAOS_ROUNDS),5) $(BIN)/python -m pytest -m stack tests/chaos $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script $(QUICK) || exit 1; done

fuzz: $(VENV)/.core
	$(BIN)/python -m tests.fuzz.run --seconds $(or $(FUZZ_SECONDS),60)
	$(BIN)/python -m tests.fuzz.images --seconds $(or $(FUZZ_SECONDS),60)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
