# Set-up, demo, tests and lint. Everything is installed into .venv; nothing is compiled.
# Another interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# -qq: errors only.
PIP_OPTIONS := --disable-pip-version-check --no-input -qq
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)

# The last OpenMMLab releases of upstream want an older Python, torch and NumPy: an environment of their own.
UPSTREAM_PYTHON ?= python3.10
UPSTREAM_BIN := .venv-upstream/bin
UPSTREAM_READY := .venv-upstream/.ready
UPSTREAM_PIP := $(UPSTREAM_BIN)/python -m pip $(PIP_OPTIONS)
# mmseg imports ftfy and regex without asking for them.
UPSTREAM := mmengine mmcv-lite mmdet mmsegmentation mmpretrain torchvision ftfy regex
# What meets OpenMMLab: registries, checkpoints, configs, operators, data sets, and the tools from training to pictures.
UPSTREAM_TESTS := $(addprefix tests/,test_registry.py test_checkpoints.py test_configs.py test_compat.py \
	backbones/test_vig_h.py backbones/test_vig.py engine datasets test_tools.py)
# Of the files with many others, those named here; of test_compat.py, not what torch.load refuses from 2.6 on;
# of the transforms, not mmdet 3.3.0's Rotate, which turns polygons another way than bitmaps.
UPSTREAM_SELECT := not (test_compat and (weights_only or other_attribute)) \
	and not (backbones and not golden) \
	and not (test_tools and not (from_quick_start or from_training)) \
	and not (test_transforms and Rotate)

# Threads that wait yield their core: spinning ones cost a busy machine five times the time.
export OMP_WAIT_POLICY := PASSIVE

# Modules are compiled once, not by every process that imports PyTorch: 5 instead of 12 seconds each.
export PYTHONDONTWRITEBYTECODE :=

# One thread per worker: two workers fill the two cores that the suite is meant for.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu test-upstream lint clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' Makefile | expand -t 22

venv: $(READY)  ## Set up .venv (2 to 6 minutes, once)

demo: $(READY)  ## Train a detector on generated shapes, evaluate it, draw its predictions
	$(BIN)/python tools/quickstart.py

test: $(READY)  ## Run the test suite (no GPU needed)
	$(TEST) -n 2 --dist loadfile

test-gpu: $(READY)  ## Run the tests that need a CUDA device
	$(TEST) -m gpu

test-upstream: $(UPSTREAM_READY)  ## Run what meets OpenMMLab with upstream's last releases (Python 3.10)
	OMP_NUM_THREADS=1 $(UPSTREAM_BIN)/python -m pytest -n 2 --dist loadfile $(UPSTREAM_TESTS) -k '$(UPSTREAM_SELECT)'

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## Remove .venv, .venv-upstream, caches and build output (data/ and work_dirs/ stay)
	rm -rf .venv .venv-upstream build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
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

$(UPSTREAM_READY): pyproject.toml setup.py constraints-upstream.txt
	@$(UPSTREAM_PYTHON) -c 'import ensurepip, sys, venv; sys.exit(0 if sys.version_info[:2] == (3, 10) else "The pins for upstream OpenMMLab are for Python 3.10; this is %d.%d (%s). Name one: make UPSTREAM_PYTHON=/path/to/python3.10 test-upstream" % (*sys.version_info[:2], sys.executable))'
	@echo 'Setting up .venv-upstream: about 6 GB, 2 to 6 minutes, once ...'
	@$(UPSTREAM_PYTHON) -m venv .venv-upstream
	$(UPSTREAM_PIP) install --no-compile -c constraints-upstream.txt -e . $(UPSTREAM) setuptools pytest pytest-xdist
	$(UPSTREAM_PIP) install --no-compile -c constraints-upstream.txt --no-deps --force-reinstall opencv-python-headless
	@touch $@
