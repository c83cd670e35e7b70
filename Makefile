# Every target sets up what it needs: the environment in .venv is built once and rebuilt when
# pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The first interpreter that is Python 3.11 or 3.12; override with `make PYTHON=... test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
TORCH := torch==2.13.0
# Test processes side by side; one file stays in one process.
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := bootpig_jax data_gen tests

.PHONY: install quickstart test test-long lint typecheck format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed: install it, or name it with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv: on Debian, apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch goes first and alone, so that nothing else's requirements choose its build.
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[data_gen,eval,dev]'
	touch $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m bootpig_jax.toyland.quickstart

test: lint typecheck
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: $(INSTALLED)
	$(BIN)/mypy bootpig_jax data_gen

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv .cache
