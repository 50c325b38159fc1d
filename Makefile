# Set-up, demo, tests and lint. Everything is installed into .venv; nothing is compiled.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# -qq: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

# Threads that wait yield their core: spinning ones cost a busy machine five times the time.
export OMP_WAIT_POLICY := PASSIVE

# One thread per worker: two workers fill the two cores that the suite is meant for.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu lint clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' Makefile | expand -t 20

venv: $(READY)  ## Set up .venv (2 to 6 minutes, once)

demo: $(READY)  ## Train a detector on generated shapes, evaluate it, draw its predictions
	$(BIN)/python tools/quickstart.py

test: $(READY)  ## Run the test suite (no GPU needed)
	$(TEST) -n 2 --dist loadfile

test-gpu: $(READY)  ## Run the tests that need a CUDA device
	$(TEST) -m gpu

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## Remove .venv, caches and build output (data/ and work_dirs/ stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# mmcv asks for opencv-python, whose windows need libGL, which servers and containers lack; the
# headless build, installed last, puts its files in the same place and needs nothing.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if v in ("3.10", "3.11", "3.12") else "mmvig needs Python 3.10, 3.11 or 3.12; this is %s (%s). Choose one: make PYTHON=python3.12" % (v, sys.executable))'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'This Python cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Setting up .venv: about 6 GB, 2 to 6 minutes, once ...'
	@$(PYTHON) -m venv .venv
	$(PIP) install --no-compile -c constraints.txt -e '.[openmmlab,dev]'
	$(PIP) install --no-compile -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	@touch $@
