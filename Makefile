# `make demo` and `make test` start from a bare clone: they create .venv, install saccade into it, and do their job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process for each core, four at most: every one loads torch. PARALLEL= runs the tests in one.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist worksteal
READY := $(VENV)/.ready
READY_DOCS := $(VENV)/.ready-docs

.PHONY: demo test test-slow check format lint types docs bench clean

demo: $(READY)
	$(BIN)/saccade demo -o demo/

test: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PARALLEL) $(ARGS)

check: lint types test

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY)
	$(BIN)/mypy

docs: $(READY_DOCS)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/python -m benchmarks classify startup

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saccade needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build
