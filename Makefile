# What there is to do here; `make serve` and `make test` are all a newcomer needs.
PORT ?= 8000
STATE ?= ./.strongroom
ENGINE ?= auto
PYTHON ?=
TARGET ?= cpu
SECONDS ?= 60
BENCH ?= gateway audit verify policy load
DOCKER ?= docker
BIN := .venv/bin

# Sets $$python to the first Python that will do, or stops with what to do.
FIND_PYTHON = for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3) ""; do \
	[ -z "$$python" ] && break; \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && break; done; \
	if [ -z "$$python" ]; then \
	echo "strongroom: $(if $(PYTHON),PYTHON=$(PYTHON) is not,found no) Python 3.11 to 3.14. Install one, or name it: make serve PYTHON=/path/to/python3.12" >&2; \
	exit 1; fi

.NOTPARALLEL:
.PHONY: help serve setup test test-slow test-gpu test-clients fmt lint type vectors fuzz bench image lock check clean setup-test

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

serve: ## run Strongroom with the embedded model: make serve PORT=8000 STATE=./.strongroom
	@$(FIND_PYTHON); exec "$$python" scripts/setup.py serve --engine "$(ENGINE)" --port "$(PORT)" --state "$(STATE)"

setup: setup-test ## install everything for development, and the commit hooks
	@if [ -e .git ]; then $(BIN)/pre-commit install; fi

setup-test:
	@$(FIND_PYTHON); exec "$$python" scripts/setup.py test --engine "$(ENGINE)"

test: setup-test lint type ## everything that runs without a GPU, the real engine included
	$(BIN)/python -m pytest

test-slow: setup-test ## the whole campaigns that make test runs in a reduced form
	$(BIN)/python -m pytest -m slow --timeout 7200

test-gpu: setup-test ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-clients: setup-test ## agents and assistants driven for real against the real engine
	$(BIN)/python -m tests.clients.install
	CLIENTS_TABLE=write $(BIN)/python -m pytest -m "clients or shows" --timeout 1800

fmt: ## format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: ## format check, lint and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

type: ## mypy, strict
	$(BIN)/mypy

vectors: setup-test ## make the known answers again; any difference fails
	for script in tests/vectors/*/generate.py; do $(BIN)/python "$$script" || exit 1; done
	git diff --exit-code -- tests/vectors

fuzz: setup-test ## the property tests with new seeds until SECONDS=60 are over
	@end=$$(($$(date +%s) + $(SECONDS))); while [ "$$(date +%s)" -lt "$$end" ]; do \
	$(BIN)/python -m pytest tests/property -q -x --hypothesis-profile=new --hypothesis-seed="$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')" || exit 1; done

bench: setup-test ## measure: make bench, or BENCH="policy verify"; what is printed is added to benchmarks/results
	@mkdir -p benchmarks/results; for name in $(BENCH); do echo "== $$name"; \
	if [ "$$name" = audit ]; then set -- --dir .; else set --; fi; \
	$(BIN)/strongroom bench "$$name" "$$@" > benchmarks/results/.last || exit 1; \
	tee -a "benchmarks/results/$$name.txt" < benchmarks/results/.last; rm benchmarks/results/.last; done

image: setup-test ## build the container image: make image TARGET=cpu|gpu (docs/dependencies.md: torch for the CPU)
	mkdir -p build
	$(BIN)/cyclonedx-py requirements locks/serve-$(TARGET).txt --of JSON -o build/sbom-$(TARGET).json
	$(DOCKER) build --target $(TARGET) --tag strongroom:$(TARGET) $(if $(PIP_EXTRA_INDEX_URL),--build-arg PIP_EXTRA_INDEX_URL) .

lock: ## write locks/ anew from pyproject.toml (UPGRADE=1: with newer transitive versions)
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

check: ## exactly what CI runs
	sh .ci/run

clean: ## remove what was built here; STATE is left alone
	rm -rf .venv .setup.lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache tests/node/node_modules \
	tests/clients/.venvs tests/clients/node/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
