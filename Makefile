# make demo and make test are all that a fresh machine needs: Python 3.11 or newer, make, and a package index.

# The first Python that is new enough; make PYTHON=/path/to/python3 chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; exit; }; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test test-all lint docs notebooks bench bench-quick clean

venv: $(STAMP)

# MKL (220 MB to download) only where MLX would be left with its reference BLAS: x86-64 Linux without OpenBLAS.
$(STAMP): pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found: install one, or make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import platform, sys; sys.exit((sys.platform, platform.machine()) == ("darwin", "x86_64") and \
		"make: this Python runs as x86-64: on Apple Silicon install an arm64 one from python.org, then make PYTHON=...")'
	@echo "installing into .venv, a minute or two"
	@$(PYTHON) -m venv .venv
	@extras=test; \
	$(BIN)/python -c 'import ctypes, sys; sys.platform == "linux" and ctypes.CDLL("libopenblas.so.0")' 2>/dev/null \
		|| extras=test,cpu-fast; \
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[$$extras]"
	@touch $@

demo: venv
	$(BIN)/mlxgpt demo

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4

# also what takes minutes
test-all: venv
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not accelerator"

lint: venv
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/pyright --warnings

# build/site, without the network: docs/ as a site, its links checked; the course as a PDF where Chromium is installed
docs: venv
	$(BIN)/python -m book build

# build/notebooks: the course's chapters, each run in a kernel
notebooks: venv
	$(BIN)/python -m book notebooks --run

bench: venv
	$(BIN)/python -m benchmarks

# does every benchmark run, and is anything far off: prints, writes nothing
bench-quick: venv
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
