# `make simulate`, `make consortium`, `make test`. Both build .venv from constraints.txt first, once.

PYTHON ?= python3.11
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup simulate consortium test lint bench-secure-sum bench-round bench-audit bench-faults bench-private-step clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

simulate: setup
	$(BIN)/fedmedgan simulate

consortium: setup
	$(BIN)/fedmedgan consortium

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	rm -rf build/types && mkdir -p build/types/fedmedgan
	for room in server client shared deploy audit simulations cli; do ln -s $(CURDIR)/$$room build/types/fedmedgan/$$room; done
	MYPYPATH=build/types $(BIN)/mypy --namespace-packages --explicit-package-bases -p fedmedgan

bench-secure-sum: setup
	$(BIN)/python benchmarks/secure_sum.py

bench-round: setup
	$(BIN)/python benchmarks/round.py

bench-audit: setup
	$(BIN)/python benchmarks/audit.py

bench-faults: setup
	$(BIN)/python benchmarks/faults

bench-private-step: setup
	$(BIN)/python benchmarks/private_step.py

clean:
	rm -rf .venv build runs
