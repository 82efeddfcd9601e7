# `make demo` and `make test` need nothing but Python 3.11+, make and gcc. EXTRA=gpu installs the CUDA build of vLLM.
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRA)
CONFIG ?= configs/demo.yaml
CODE := flows operators kernels cluster

.PHONY: help install demo test check bench ui clean

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(INSTALLED) ## create .venv with everything in it

$(INSTALLED): pyproject.toml .ci/install .ci/constraints-cpu.txt
	.ci/install $(PYTHON) $(VENV) $(EXTRA)
	@touch $@

demo: $(INSTALLED) ## recycle 32 records, train on them, report: minutes on two cores
	$(BIN)/python flows/recycle_and_train.py --config configs/demo.yaml

test: $(INSTALLED) ## run all tests, the fast ones first
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED) ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## measure; results go to the terminal
	@for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark || exit 1; done

ui: $(INSTALLED) ## Dagster's web UI and daemon beside a local Ray cluster, on 127.0.0.1
	RECYCLE_CONFIG=$(CONFIG) $(BIN)/python -m flows.ui

clean: ## remove .venv, caches and the demo's results
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
