# Every command of this project. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SEEDS ?= 0 1 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test
help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(READY) ## make the environment in .venv (exact versions of requirements.txt)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

reproduce-2d: $(READY) ## the paper's 2-D protocol on every set, resumable (about an hour and a half on 2 cores)
	$(BIN)/repro run '2d-*' --seeds $(SEEDS) --jobs $(JOBS) --resume --device cpu
	$(BIN)/repro report --title "Results: Table 1 of the paper"
