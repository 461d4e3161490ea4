# One command each; every target makes the environment it needs.
#
#   make demo    the whole path on this machine: crawl, clean, train, kill, resume, export, report
#   make test    the test suite
#   make lint    ruff, mypy, import rules
#   make test-oracles    our parallelism against that of megatron-core and DeepSpeed

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
# Where pip finds the CPU build of torch when the default package index has none
# (the address is in PyTorch's installation guide).
TORCH_INDEX ?=
DEMO_DIR ?= demo
# Tests that run at the same time. More are slower: their ranks stop each other at each message.
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# megatron-core and DeepSpeed, on top of what is in VENV.
ORACLES := $(VENV)-oracles
ORACLES_INSTALLED := $(ORACLES)/.installed
# A file's tests in their order, on one worker; those that share nothing last (tests/conftest.py).
PYTEST = $(BIN)/pytest --no-loadscope-reorder
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(filter-out 0,$(HAS_GPU)),)
TORCH := torch==$(TORCH_VERSION)+cpu
else
TORCH := torch==$(TORCH_VERSION)
endif

.PHONY: install install-oracles demo test test-slow test-oracles lint format clean

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) || { \
	  echo "make: pip found no $(TORCH). Name an index that has it: make $(MAKECMDGOALS) TORCH_INDEX=URL" >&2; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/farspan demo --out $(DEMO_DIR)

test: $(INSTALLED)
	$(PYTEST) -n $(WORKERS) -m "not slow and not oracle"

test-slow: $(INSTALLED)
	$(PYTEST) -n $(WORKERS) -m slow

$(ORACLES_INSTALLED): $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(ORACLES)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$($(ORACLES)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip --python $(ORACLES)/bin/python install --quiet \
	  --no-build-isolation -c constraints.txt -e '.[megatron,deepspeed]'
	@touch $@

install-oracles: $(ORACLES_INSTALLED)

test-oracles: $(ORACLES_INSTALLED)
	$(ORACLES)/bin/python -m pytest -m oracle

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(ORACLES) $(DEMO_DIR)
