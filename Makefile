# Everything runs in .venv, which is made on the first call; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint bench evidence evidence-context clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install ftw with what its development needs

# A stamp rather than the folder itself, so that an interrupted set-up is resumed and a changed pin is installed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11, which ftw needs; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# torch first and alone: with the rest in one call, pip may choose a build with several GB of CUDA libraries.
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## fine-tune on an embedded mixture: ours against random and full; under three minutes
	$(BIN)/ftw demo $(ARGS)

# One thread a process: JOBS processes share the cores. A fixed hash seed, so that a failure can be repeated.
# loadgroup: tests that share one costly set-up, such as the built wheels, stay in one process.
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

test: $(INSTALLED) ## the tests, but for the slow ones (JOBS=2, ARGS='-k name')
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(INSTALLED) ## those that take more than a few seconds: several processes, killed runs, statistics
	$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED) ## every benchmark, one after the other
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

evidence: $(INSTALLED) ## the evidence harness, resumed: make evidence DATA=folder ARGS='--grid axes' (docs/evidence.md)
	@test -n "$(DATA)" || { echo "make evidence needs DATA=<folder of JSONL files>; see docs/evidence.md"; exit 2; }
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -m evidence run $(DATA) --jobs $(JOBS) $(ARGS)

evidence-context: $(INSTALLED) ## its study of long contexts (DATA=folder; without it on generated text)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(BIN)/python -m evidence context $(DATA) $(ARGS)

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find ftw integrations tests benchmarks examples -depth -type d \
		\( -name __pycache__ -o -name '*.egg-info' -o -name dist \) -exec rm -rf {} +
