# `make demo` and `make test` do all set-up themselves on a fresh Debian or Ubuntu machine with Python 3.11.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV := $(shell command -v uv || echo build/uv/bin/uv)
export UV  # `otj model smollm2` installs a package where the environment has no pip
PYTHON ?= python3
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BIN := .venv/bin
EXPORT = $(UV) export --quiet --format requirements-txt --no-hashes --no-emit-workspace --no-annotate --no-header

.PHONY: help setup demo lint format test test-contract test-runs test-scripts nightly requirements generate

help:  ## Show what there is to make
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

build/uv/bin/uv:
	@$(PYTHON) -m venv build/uv || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@build/uv/bin/pip install --quiet uv

# Installs exactly what requirements.txt pins; both packages are editable, so a change of code needs no new set-up. Bytecode is compiled at
# once: where PYTHONDONTWRITEBYTECODE is set, each of a run's eight processes would otherwise compile torch and vLLM anew, 20 s apiece.
.venv/.installed: requirements.txt pyproject.toml operator/pyproject.toml runtime/pyproject.toml | $(UV)
	@command -v cc > /dev/null || $(SUDO) apt-get install --yes --quiet gcc python3-dev  # one puzzle package of reasoning-gym has no wheel
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
	$(UV) pip sync --quiet --compile-bytecode requirements.txt
	$(UV) pip install --quiet --no-deps --editable operator --editable runtime
	@touch $@

setup: .venv/.installed  ## Install everything into .venv

lint: setup  ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Kubernetes and Helm are compiled, once per machine, before what shares the processors with the compilers: beside vLLM both starve.
test: setup  ## Every test that needs no cluster: fast ones first, then those with real servers
	$(BIN)/pytest -n 2 --dist loadfile -m 'not integration and not e2e and not nightly'
	$(BIN)/python -m tests.cluster.binaries
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-contract test-runs test-scripts

# Two of the three at a time: the first mostly waits for its API server, the others for processors, and the last begins when one of them ends.
# Each in one process, because its tests share servers, and the last of the contract read in the API server's log what all of them did.
test-contract: setup
	$(BIN)/pytest tests/contract -m 'integration and not nightly' --durations=15

test-runs: setup
	$(BIN)/pytest tests/integration -m 'integration and not nightly' $(SCRIPTS:%=--ignore=%) --durations=25

SCRIPTS := tests/integration/test_examples.py tests/integration/test_trl_script.py

test-scripts: setup
	$(BIN)/pytest $(SCRIPTS) -m 'integration and not nightly' --durations=5

nightly: setup  ## What takes too long for every change: many more examples and the slow cases with real servers
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest -m 'not integration and not e2e'
	$(BIN)/pytest -m 'nightly and not e2e and not deepspeed' --durations=25
	@$(MAKE) --no-print-directory test-deepspeed

MODELS := build/models

$(MODELS)/SmolLM2-135M-Instruct/config.json: | setup
	$(BIN)/otj model smollm2 $(@D)

demo: $(MODELS)/SmolLM2-135M-Instruct/config.json  ## Watch a real small language model learn to add: no cluster, no GPU, a few minutes
	$(BIN)/otj run manifests/samples/grpo-addition.yaml --volume models=$(MODELS) --run-dir build/demo --clean --result build/demo.json

requirements:  ## Pin the newest versions that the packages allow
	$(UV) lock --upgrade
	$(EXPORT) --all-packages --all-extras --no-extra vllm > requirements.txt
	$(EXPORT) --no-dev --package online-training-operator > operator/requirements.txt
	$(EXPORT) --no-dev --package online-training-runtime --extra cpu > runtime/requirements-cpu.txt
	$(EXPORT) --no-dev --package online-training-runtime --extra vllm > runtime/requirements-vllm.txt
	$(EXPORT) --no-dev --package online-training-runtime --extra tasks > runtime/requirements-tasks.txt

-include $(wildcard make/*.mk)
