# Everything a person or a robot needs: `make demo`, `make test`. Everything a contributor needs: `make check`.
# The environment is built on the first call and kept up to date by the others; every target can be run again.

PYTHON ?= python3
# Where to get PyTorch: give https://download.pytorch.org/whl/cpu for the small build without CUDA.
TORCH_INDEX ?=
# Processes that run tests side by side.
TEST_JOBS ?= 2
# Options of `bitvla demo` and of `bitvla bench`.
DEMO_OPTIONS ?=
POLICY ?= src/bitvla/policies/metaworld-mt10-nano.safetensors

export PYTHON
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# A process that dies, or hangs and is ended, has failed: its test is not run again.
PYTEST := $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --max-worker-restart 0 -q
# What the installed package is made from, besides the Python files, which are used in place.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup libero demo test check lint bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(VENV)/.ready-dev ## build the whole environment in .venv (training, simulator, reports, tools)
	@echo "setup: ready; activate it with '. $(BIN)/activate', or run $(BIN)/bitvla"

libero: .venv-libero/.ready ## install the LIBERO benchmark into .venv-libero (340 MB to download, 1.4 GB on disk)
	@echo "libero: ready; try $(BIN)/bitvla eval POLICY --env libero --suite libero_spatial --episodes 1"

demo: $(VENV)/.ready-demo ## install what the demo needs (no PyTorch) and run the shipped policy in the simulator
	@echo "demo: running the shipped policy closed loop in the simulator"
	@$(BIN)/bitvla demo $(DEMO_OPTIONS)

test: $(VENV)/.ready-dev ## run every test: native kernels (each instruction set, sanitizers), then Python
	@scripts/system_packages.sh cross qemu || echo "test: going on without the kernels for ARM"
	@echo "test: native kernels, every instruction set this machine can run or emulate"
	@PATH="$(abspath $(BIN)):$$PATH" tests/native/run.sh $(if $(CI),--ci)
	@echo "test: Python"
	@$(PYTEST)

check: lint ## format, lint, types and fast tests: run it before every commit
	@echo "check: fast tests"
	@$(PYTEST)

lint: $(VENV)/.ready-dev ## format, lint and types alone
	@echo "check: format"
	@$(BIN)/ruff format --check .
	@echo "check: lint"
	@$(BIN)/ruff check .
	@echo "check: types"
	@$(BIN)/mypy

bench: $(VENV)/.ready-dev ## measure the kernels and the shipped policy on this machine
	@echo "bench: the shipped policy, part by part"
	@$(BIN)/bitvla bench $(POLICY)

clean: ## remove build products and caches; .venv, runs and datasets stay
	@echo "clean: removing build products and caches"
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready-pip:
	@scripts/system_packages.sh python venv
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@touch $@

$(VENV)/.ready-demo: $(SOURCES) | $(VENV)/.ready-pip
	@scripts/system_packages.sh headers compiler opengl
	@echo "setup: building the kernels and installing the demo's packages (about a minute)"
	@$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/.ready-dev: $(SOURCES) | $(VENV)/.ready-pip
	@scripts/system_packages.sh headers compiler opengl
	@echo "setup: installing PyTorch (a few minutes the first time)"
	@$(PIP) install 'torch<2.14' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "setup: building the kernels and installing training, simulator, reports and tools"
	@$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.ready-demo

# An environment of its own: LIBERO's pins never meet ours. Without the mark at the end it counts as not installed.
.venv-libero/.ready: src/bitvla/sim/libero/requirements.txt
	@scripts/system_packages.sh python venv opengl
	@echo "libero: creating .venv-libero and installing LIBERO (a few minutes)"
	@$(PYTHON) -m venv .venv-libero
	@.venv-libero/bin/python -m pip --disable-pip-version-check -q install -r $<
	@echo "libero: checking that it can be imported"
	@.venv-libero/bin/python -I -c 'from libero.libero import benchmark' >/dev/null
	@touch $@
