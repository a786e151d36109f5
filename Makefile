# `make` or `make help` lists the targets. Everything runs in .venv, made on first use and renewed when
# pyproject.toml or constraints.txt changes.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
ARGS ?=

.PHONY: help install install-test decode test test-core lint format bench models clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  ARGS="..." is handed on, for example: make decode ARGS="--help" or make test ARGS="-k metrics"'

install: $(VENV)/.installed  ## make .venv with the package in it

install-test: $(VENV)/.installed-test  ## the same with what the tests and linters need

decode: $(VENV)/.installed  ## decode the tiny test problems: gradient-based decoding beside its rivals
	$(OFFLINE) $(PYTHON) scripts/decode.py $(ARGS)

test: $(VENV)/.installed-test  ## run every test this machine can run, offline
	OMP_NUM_THREADS=1 $(OFFLINE) $(PYTHON) -m pytest -n 2 $(ARGS)

CORE := tests/functional tests/samplers tests/metrics tests/test_dto.py tests/test_ledger.py tests/decoding nabla_rl/functional

test-core: $(VENV)/.installed-test  ## the algorithms on toys alone, in under a minute
	OMP_NUM_THREADS=1 $(OFFLINE) $(PYTHON) -m pytest -q -n 2 -m "not slow" $(CORE) $(ARGS)

lint: $(VENV)/.installed-test  ## ruff, ruff format, pyright, import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-test  ## let ruff format and fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.installed-test  ## run the files of benchmarks/, one after the other
	@for file in benchmarks/[!_]*.py; do \
	  [ -e "$$file" ] || { echo "make bench: benchmarks/ holds no Python file"; exit 1; }; \
	  echo "== $$file"; $(OFFLINE) $(PYTHON) "$$file" $(ARGS) || exit 1; \
	done

MODELS := tiny-strong tiny-policy tiny-student gold-base reward-steps reward-answers tiny-reward gold-steps gold-answers tiny-gold tiny-taught

models: $(VENV)/.installed  ## train the embedded tiny models of both families anew, then measure their cards (hours on two cores)
	@for family in sorting words; do \
	  for model in $(MODELS); do \
	    [ -e configs/train_tiny/$$family/$$model.yaml ] || continue; \
	    echo "== $$family/$$model"; \
	    $(OFFLINE) $(PYTHON) scripts/train_tiny.py --config configs/train_tiny/$$family/$$model.yaml $(ARGS) || exit 1; \
	  done; \
	  $(OFFLINE) $(PYTHON) scripts/train_tiny.py --card $$family || exit 1; \
	done

clean:  ## remove .venv, build products and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first of these that is Python 3.11 or newer makes the environment; `make PYTHON3=/path/to/python ...` overrides.
PYTHON3 ?= python3.11 python3 python3.12 python3.13
$(PYTHON):
	@for candidate in $(PYTHON3); do \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && found="$$candidate" && break; \
	done; \
	[ -n "$$found" ] || { \
	  echo "nabla_rl needs Python 3.11 or newer, and none of these is: $(PYTHON3). Install one, or name it: make PYTHON3=/path/to/python"; \
	  exit 1; }; \
	"$$found" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$$found cannot make virtual environments here. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }; \
	echo "making $(VENV) with $$found"; "$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Order-only on the interpreter: its timestamp says nothing about what is installed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing the package into $(VENV) (minutes the first time)"
	@$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(PYTHON)
	@echo "installing the package and its tests' tools into $(VENV) (minutes the first time)"
	@$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.installed
