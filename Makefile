# What people type here. `make help` lists it.
#
# Everything runs in .venv, which `make venv` creates and keeps up to date.

PYTHON ?= python3
ARGS ?=
PINS ?=
BIN := .venv/bin
CHECK := build/check
QUICK := readme main batch binding distributions equilibrium game likelihood limiting loader loss play
QUICK := pyro_symeq $(QUICK:%=tests/test_%.py)

.PHONY: help venv demo bench robustness results test quick lint types docs dist check-dist clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 19

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

quick: venv  ## the tests of a minute: the examples of the reference, and what all else stands on
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS) $(QUICK)

lint: venv  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv  ## static types
	$(BIN)/mypy

docs: venv  ## the documentation, in docs/_build/html; executes its notebook
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -E -a -W --keep-going -n -q docs docs/_build/html

dist: venv  ## build the wheel and the source archive, in dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# The source archive gives the tests, and the wheel what is tested: first with what it requires, and
# then with what the tests require. PINS are more packages for pip, such as torch==2.6.0.
check-dist: dist  ## install the wheel into an empty environment and run the quick tests there
	rm -rf $(CHECK)
	mkdir -p $(CHECK)
	tar -xf dist/*.tar.gz -C $(CHECK) --strip-components=1
	rm -r $(CHECK)/pyro_symeq $(CHECK)/pyro_symeq.egg-info
	$(PYTHON) -m venv --without-pip $(CHECK)/.venv
	$(BIN)/python -m pip --python $(CHECK)/.venv/bin/python install dist/*.whl $(PINS)
	cd $(CHECK) && .venv/bin/python -W error -m pyro_symeq
	$(BIN)/python -m pip --python $(CHECK)/.venv/bin/python install "$$(echo dist/*.whl)[dev]" $(PINS)
	cd $(CHECK) && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto $(ARGS) --pyargs $(QUICK)
	rm -rf $(CHECK)

clean:  ## remove all that was built, .venv too
	rm -rf .venv build dist *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
