# `make demo` and `make test` are all that most people need; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
WORKERS ?= 2
TRITON ?= triton==3.6.0

# Torch's threads spin while they wait for each other. Long spins, the default, halve the speed or
# worse as soon as anything else runs; short ones cost a sixth of it when nothing does.
GOMP_SPINCOUNT ?= 1000
export GOMP_SPINCOUNT

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
STAMP := $(VENV)/.built

# The stamp keeps what torch was asked for, so that it has to be said once only. Saying something
# else makes the environment anew.
built := $(shell cat $(STAMP) 2>/dev/null)
asked := $(strip $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)))
said := $(filter-out file,$(origin TORCH) $(origin TORCH_INDEX_URL))
request := $(if $(said),$(asked),$(or $(built),$(asked)))
ifneq ($(request),$(built))
.PHONY: $(STAMP)
endif

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */make \1\t/' | expand -t 14
	@echo
	@echo 'Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  WORKERS=$(WORKERS)'
	@echo '           TORCH=$(TORCH)  TORCH_INDEX_URL=$(TORCH_INDEX_URL)'
	@echo 'CPU-only PyTorch: make env TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu'

.PHONY: demo
demo: env  ## train a tiny model on this machine's Python sources, then let it write
	rm -rf runs/demo
	$(BIN)/python -m nsa.tools.train --preset tiny --out runs/demo
	$(BIN)/python -m nsa.tools.generate runs/demo --prompt 'def '

.PHONY: test
test: lint types  ## lint, type check and all tests that need neither a GPU nor patience
	@# Triton's interpreter changes what a kernel is for the whole process: one of its own, first.
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then set -x; \
	  TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/triton_interpreter; \
	  else echo 'triton is not installed: its kernels go untested'; fi
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

.PHONY: lint
lint: env  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: env  ## mypy
	$(BIN)/mypy

.PHONY: env
env: $(STAMP)  ## the environment, from constraints.txt; kept until that file changes

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: expected Python >= 3.10, got PYTHON=$(PYTHON)," \
	    "which is $$($(PYTHON) --version 2>/dev/null || echo 'not there');" \
	    "name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make environments;" \
	    "on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	rm -f $(STAMP)
	$(PYTHON) -m venv $(if $(built),$(if $(subst $(built),,$(request)),--clear)) $(VENV)
	@# Everything but torch is held to constraints.txt; torch is what was asked for.
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade -c $(VENV)/constraints.txt pip setuptools
	$(BIN)/python -m pip install $(request) $(if $(findstring --index-url,$(request)),,-c $(VENV)/constraints.txt)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e '.[dev,train]'
	@# CUDA builds of PyTorch bring triton; beside a CPU build it runs the kernels in its interpreter.
	if [ "$$(uname -s)" = Linux ]; then \
	  $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON); fi
	@echo '$(request)' > $(STAMP)

.PHONY: docs
docs: env  ## the API reference, from docstrings, into build/docs
	@# pdoc is no part of the environment until someone wants it.
	$(BIN)/python -c 'import pdoc' 2>/dev/null || $(BIN)/python -m pip install --quiet \
	  --no-build-isolation -c $(VENV)/constraints.txt -e '.[docs]'
	rm -rf build/docs
	$(BIN)/python docs/api/api_pages.py build/docs

.PHONY: dist
dist: env  ## the sdist, and the wheel that is built from it, in dist/
	rm -rf build dist *.egg-info
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

.PHONY: mutants
mutants: env  ## mutation testing: does a test notice every small change? Not for the impatient
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(VENV)/constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

.PHONY: clean
clean:  ## removes the environment, caches and build files; runs/ stays
	if [ -e $(STAMP) ]; then rm -rf $(VENV); fi
	rm -rf build dist mutants *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find nsa tests -name __pycache__ -type d -prune -exec rm -rf {} +
