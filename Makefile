# `make help` lists the targets. Everything runs in .venv, which is made on first use and remade when pins change.

PYTHON ?= python3.11

FRAMES ?= 50000
SEED ?= 0
OUT ?= runs/demo
# Not `?=`: shells keep the path of a start-up file in an environment variable of this name.
ENV = InvertedDoublePendulum-v5

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-browser peers bench bench-table docs lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

demo: .venv/.stamp ## train PPO with observers attached; prints the path of its report (FRAMES, ENV, SEED, OUT)
	@$(BIN)/tdhook-train demo --frames $(FRAMES) --env $(ENV) --seed $(SEED) --out "$(OUT)" --overwrite

# one thread of torch: networks are small here, and a second one that waits awake takes the core of other processes
test: lint ## linters, then the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4

test-all: lint ## linters, then every test, slow ones too
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' -n auto --maxprocesses 4

test-browser: .venv/.stamp ## the report in a headless Chromium, Debian's package, installed where that is allowed
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } || \
	    echo "No chromium here, and none could be installed: the tests will be skipped."
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt "playwright>=1.50" || \
	    echo "playwright could not be installed: the tests will be skipped."
	$(BIN)/pytest -m browser -rs

peers: .venv-peers/.stamp ## the tests that compare with other libraries, those of peers.txt
	.venv-peers/bin/python -m pytest tests/hooks tests/methods tests/metrics -k 'peers or captum or zennit'

bench: .venv/.stamp ## every script of bench/ in turn, beside the peers where `make peers` was; an hour or two
	@set -e; python=$(BIN)/python; test ! -e .venv-peers/.stamp || python=.venv-peers/bin/python; \
	    for script in bench/[!_]*.py; do echo "== $$script"; $$python "$$script" --keep; done

bench-table: .venv/.stamp ## the table of bench/README.md, from what the scripts kept
	@$(BIN)/python bench/_table.py

docs: .venv/.stamp ## the documentation, warnings are errors; prints the path of its first page
	@$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt sphinx furo myst-parser
	@$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

lint: .venv/.stamp ## ruff, mypy and the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean: ## remove .venv, .venv-peers, builds and caches; runs/ stays
	rm -rf .venv .venv-peers build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Asked of the interpreter itself: a pyenv shim is found on PATH even where no version stands behind it.
# -qq: errors are shown, remarks on how this machine finds its packages are not.
.venv/.stamp: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer, with its venv module, is needed, and '$(PYTHON)' does not run as one." >&2; \
	    echo "Name one that does: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making .venv with $$("$(PYTHON)" --version) ..."
	@"$(PYTHON)" -m venv .venv
	@echo "Installing $$(grep '^torch==' constraints.txt) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@echo "Installing tdhook-train with everything it is developed with (some minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "Environment ready: .venv"

# The packages of .venv are lent, not copied: the .pth file has them found after those installed here.
.venv-peers/.stamp: peers.txt .venv/.stamp
	@echo "Making .venv-peers ..."
	@$(BIN)/python -m venv --clear --without-pip .venv-peers
	@lent=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    own=$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    echo "import site; site.addsitedir('$$lent')" > "$$own/lent.pth"
	@$(BIN)/python -m pip --python .venv-peers/bin/python install -qq --disable-pip-version-check --no-deps -r peers.txt
	@touch $@
	@echo "Environment ready: .venv-peers"
