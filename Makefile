# `make demo` and `make test` need Python 3.11 to 3.13, make and gcc, nothing else. EXTRA=gpu installs the CUDA build of vLLM.
PYTHON ?= python3
VENV := .venv
# What is installed stays: without EXTRA=cpu no target replaces the CUDA build.
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRA)
CONFIG ?= configs/demo.yaml
# Processes for the tests; each starts its own Ray. Most slow tests wait more than they compute.
WORKERS ?= 2
# Many images set this. Each of a run's dozens of processes would compile the project's modules anew, for a second each.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-long check format docs bench ui wheel clean clean-runs

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s  %s\n", $$1, $$2}'

install: $(INSTALLED) ## create .venv with everything in it: about 4 GB, one to four minutes

$(INSTALLED): pyproject.toml .ci/install .ci/constraints-cpu.txt
	.ci/install $(PYTHON) $(VENV) $(EXTRA)
	@touch $@

demo: $(INSTALLED) ## recycle a small data set, train on it, report: 5 to 10 minutes on two cores
	$(BIN)/python flows/recycle_and_train.py --config configs/demo.yaml

# Each test process uses one thread; with more, the threads would wait for each other.
test test-fast: export OMP_NUM_THREADS = 1

test: test-fast ## all tests but the long ones: up to 50 minutes on two cores
	@echo "the slow tests: up to 40 minutes on two cores"
	$(BIN)/python -m pytest -m "slow and not long" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

test-long: export OMP_NUM_THREADS = 1
test-long: $(INSTALLED) ## the long tests, before a release
	$(BIN)/python -m pytest -m long --durations 15

test-fast: $(INSTALLED) ## the tests without engines, clusters and browsers: up to 10 minutes on two cores
	@echo "the fast tests: up to 10 minutes on two cores"
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

check: $(INSTALLED) ## lint, format, types, import contracts: about 2 minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## format the code, fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## write docs/configuration.md and configs/schema.json from the code
	$(BIN)/python -m flows.configuration_page

bench: $(INSTALLED) ## run all benchmarks at small sizes and print one table
	$(BIN)/python benchmarks/run_all.py

ui: $(INSTALLED) ## Dagster's web UI and daemon with a local Ray cluster, on 127.0.0.1
	RECYCLE_CONFIG=$(CONFIG) $(BIN)/python -m flows.ui

wheel: $(INSTALLED) ## build dist/recycle_and_train-*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove caches and build outputs; never .venv, never runs
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs: ## remove runs/: asks first, because it holds all stored replies of teachers
	@[ -d runs ] || { echo "there is no runs/"; exit 0; }; du -sh runs/*; \
	printf 'Remove all of this, including all stored replies of teachers? Type yes: '; \
	read answer; [ "$$answer" = yes ] || { echo "nothing was removed"; exit 0; }; rm -rf runs
