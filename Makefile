# Two commands do everything: `make quickstart` and `make test`. Both set up their own .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
QUICKSTART ?= full
MODEL ?= hybrid
# Files of tests beside each other, in the order of tests/conftest.py; half of the tests have ranks
# of their own, so two fill 2 cores.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false

.PHONY: setup quickstart test check lint types contracts clean

setup: $(STAMP)

# torch first and pinned: any looser request would fetch gigabytes of device libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/python -m launch.quickstart size=$(QUICKSTART) target=$(MODEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

# Small CPU matrices gain nothing from many threads, and ranks share the cores.
check test: export OMP_NUM_THREADS := 1

check: lint types contracts
	$(PYTEST) -m "not slow and not gpu and not multi_gpu"

test: lint types contracts
	$(PYTEST) -m "not gpu and not multi_gpu"

clean:
	rm -rf outputs build dist .pytest_cache .mypy_cache .ruff_cache
