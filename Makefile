# Every command of this project. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SEEDS ?= 0 1 2
PORT ?= 8000
DATA_ROOT ?= data
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINE := templates/reproduction/repro
DEMO_REPORT := reference_impl/reports/demo

# The demo trains a tenth of the paper's steps on a small pool, and a third of the steps on digits. Its report says so and gives no verdicts.
DEMO_SETTING := --train-iters 2000 \
	--set phases.velocity_field.pool.batches=32 \
	--set phases.velocity_field_100.pool.batches=8 \
	--set evaluation.floor_draws=1
DIGITS_DEMO := --train-iters 700 --set evaluation.samples=300 --set evaluation.nearest=100

REPORT := $(BIN)/repro report --title "Results: Tables 1 to 3 of the paper" --checklist \
	--note --claims 'rank-*' 'digits-*' 'mnist-reduced-*'

TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.PHONY: help setup demo test test-slow lint site site-zensical serve reproduce-2d reproduce-digits reproduce-mnist-reduced tutorial skill lock calculator catalogue notebooks benchmark same-bits test-gpu

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 26

setup: $(READY) ## make the environment in .venv, with the exact versions of requirements.txt

$(READY): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $(READY).begun  # as old as the beginning: a file that is edited meanwhile is newer
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@mv $(READY).begun $(READY)

demo: $(READY) ## a short run of every 2-D experiment and of digits, judged and shown on the built site
	rm -rf runs/demo $(DEMO_REPORT)
	$(BIN)/repro run '2d-*' --runs runs/demo --jobs $(JOBS) --device cpu $(DEMO_SETTING) > /dev/null
	$(BIN)/repro run digits --runs runs/demo --device cpu $(DIGITS_DEMO) > /dev/null
	$(BIN)/repro report --runs runs/demo --out $(DEMO_REPORT) --title "Your demo run" > /dev/null
	@$(MAKE) --no-print-directory site
	@echo
	@echo "Your run:              site/$(DEMO_REPORT)/index.html"
	@echo "The full runs:         site/reference_impl/reports/index.html"
	@echo "To read them:          make serve, then http://localhost:$(PORT)"

test: $(READY) ## the tests of every change
	$(TESTS)

test-slow: $(READY) ## the tests that need minutes each: the site in a browser, the tutorial, generated projects, runs killed everywhere
	$(TESTS) -m 'slow and not gpu'

lint: $(READY) ## format and lint, as the check does
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet --config 'line-length = 110' $(ENGINE)
	$(BIN)/ruff check --quiet --config 'line-length = 110' --extend-select E501 $(ENGINE)
	$(BIN)/mypy

test-gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

site: $(READY) $(DEMO_REPORT)/README.md ## build the site into site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict
	$(BIN)/python theme/after_build.py site

site-zensical: $(READY) $(DEMO_REPORT)/README.md ## build the site with Zensical, what comes after Material, into site/
	rm -rf site
	$(BIN)/zensical build --strict --clean
	$(BIN)/python theme/after_build.py site

$(DEMO_REPORT)/README.md: # written by `make demo`; the navigation names it, so something must be there
	@mkdir -p $(DEMO_REPORT); printf '# Your demo run\n\nNone yet on this machine. `make demo` makes one.\n' > $@

serve: ## serve the built site on http://localhost:8000 (PORT=... for another)
	@[ -f site/index.html ] || { echo "make: found no site/index.html; run make demo or make site first" >&2; exit 2; }
	@echo "http://localhost:$(PORT)"
	@"$(PYTHON)" -m http.server $(PORT) --bind 127.0.0.1 --directory site

reproduce-2d: $(READY) ## the paper's 2-D protocol on every set and seed; resumable; about two hours on 2 cores
	$(BIN)/repro run '2d-*' --seeds $(SEEDS) --jobs $(JOBS) --resume --device cpu
	$(REPORT)

reproduce-digits: $(READY) ## NSGF++ on 8x8 digits, every seed; resumable; a quarter of an hour a seed and core
	$(BIN)/repro run digits --seeds $(SEEDS) --jobs $(JOBS) --resume --device cpu
	$(REPORT)

reproduce-mnist-reduced: $(READY) ## MNIST (read from DATA_ROOT=data) in a setting for CPUs, every seed; resumable; about half an hour a seed and core
	$(BIN)/repro run mnist-reduced --seeds $(SEEDS) --jobs $(JOBS) --resume --device cpu --data-root '$(DATA_ROOT)'
	$(REPORT)

tutorial: $(READY) ## make the tutorial's project in build/forward-forward: the scaffold, and the files that its steps write
	rm -rf build/forward-forward
	$(BIN)/copier copy --quiet --defaults --vcs-ref HEAD --data-file tutorial/answers.yaml . build/forward-forward
	cp -r tutorial/project/. build/forward-forward
	sed -i 's|^dependencies = \[|&\n    "scikit-learn>=1.5,<2",  # its 8 x 8 digits|' build/forward-forward/pyproject.toml

skill: $(READY) ## the skill that is installed, checked: dist/paper-reproduction and a zip of it
	$(BIN)/python -m bundle.build
	$(BIN)/agentskills validate dist/paper-reproduction

lock: $(READY) ## write anew what the template locks, from the versions of requirements.txt: every package with its hashes
	"$(PYTHON)" -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	PATH="$$PWD/build/lock/bin:$$PATH" $(BIN)/python -m bundle.lock

calculator: $(READY) ## ask `repro memory` anew for what the calculator of the site shows; a quarter of an hour on an idle core
	$(BIN)/python -m benchmarks.calculator

catalogue: $(READY) ## write anew what follows from the entries of LEARNING.md: index, principles, links of the pages
	$(BIN)/python tests/docs/catalogue.py

notebooks: $(READY) ## write the notebooks of the reference implementation anew
	for one in 'mnist kaggle' 'mnist colab' 'cifar10 kaggle'; do set -- $$one; \
	  $(BIN)/repro notebook $$1 --platform $$2 --seeds 0 1 2 --source paper-reproduction.zip \
	    --data-cell reference_impl/notebooks/data.py --runs /nowhere > /dev/null; done

benchmark: $(READY) ## time of the engine beside plain scripts, of workers and of two processes; time and memory of the Sinkhorn velocity and of a pool minibatch
	PYTHONPATH=.:$(ENGINE)/.. $(BIN)/python -m benchmarks.engine
	PYTHONPATH=.:$(ENGINE)/.. $(BIN)/python -m benchmarks.parts
	$(BIN)/python -m benchmarks.sinkhorn
	$(BIN)/python -m benchmarks.pool

same-bits: $(READY) ## the engine against that of version 0.1, bit for bit, and a killed run against one that was not; two minutes
	$(BIN)/python -m benchmarks.same_bits
