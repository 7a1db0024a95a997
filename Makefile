# What people type here. `make help` lists it.
#
# Everything runs in .venv, which `make venv` creates and keeps up to date.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: help venv demo bench robustness results test lint types docs clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 19

venv: .venv/installed  ## create .venv and install the package with all it needs

demo: venv  ## train on handwritten digits and draw the result (options: ARGS="--steps 500")
	$(BIN)/python examples/digits.py $(ARGS)

bench: venv  ## time a training step beside a loop by hand and Pyro's (options: ARGS=--full)
	$(BIN)/python benchmarks/steps.py $(ARGS)

robustness: venv  ## tell which architectures learn, by which method (options: ARGS=--quick)
	$(BIN)/python benchmarks/robustness.py $(ARGS)

results: venv  ## write docs/results.md from the files of runs in docs/results
	$(BIN)/python examples/results_page.py $(ARGS)

test: lint types docs  ## all checks: lint, types, docs, then the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: venv  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## static types
	$(BIN)/mypy

docs: venv  ## the documentation, in docs/_build/html; executes its notebook
	$(BIN)/sphinx-build -E -a -W --keep-going -n -q docs docs/_build/html

clean:  ## remove all that was built, .venv too
	rm -rf .venv build *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyro_symeq tests examples docs -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: setup.cfg pyproject.toml | .venv/bin/pip
	@echo "Installing into .venv. The first time, this takes some minutes and several GB."
	$(BIN)/python -m pip install --editable '.[examples,docs,dev]'
	@touch $@

# A Python without ensurepip (Debian's, before its python3-venv is there) lends its own pip.
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "pyro_symeq needs Python 3.10 or newer. Name one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; \
	then $(PYTHON) -m venv .venv; \
	else $(PYTHON) -m venv --without-pip .venv \
	    && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; \
	fi || { rm -rf .venv; \
	    echo "No virtual environment: this Python lacks ensurepip and a pip of 22.3 or newer." >&2; \
	    echo "On Debian and Ubuntu, run: apt install python3-venv" >&2; exit 1; }
