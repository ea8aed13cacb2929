# `make` lists the targets. Every target that needs Python makes .venv first (scripts/venv), which is quick when nothing changed.
.DEFAULT_GOAL := help
.PHONY: help venv venv-dev demo test test-exhaustive test-all check format bench clean
PY := .venv/bin/python
export PYTHON

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F '|' '{printf "  make %-15s %s\n", $$1, $$2}'

venv: ## make .venv with what serving needs
	@scripts/venv runtime

venv-dev:
	@scripts/venv dev

demo: venv ## extract the bundled checkpoint, serve it on 127.0.0.1 and stream a first answer
	@$(PY) -m server.cli.demo

# Threads of a parallel loop sleep when they wait: spinning, the default, is 15 times slower where two programs want the cores.
# Files go to the two processes in their order: the last ones are short, so that both end together.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test test-exhaustive test-all: export OMP_WAIT_POLICY ?= PASSIVE

test: venv-dev ## run the tests
	@$(PYTEST)

test-exhaustive: venv-dev ## run the long tests that `make test` leaves out
	@$(PYTEST) -m exhaustive

test-all: venv-dev ## run all tests
	@$(PYTEST) -m "exhaustive or not exhaustive"

check: venv-dev ## ruff (format and lint) and mypy --strict on the four packages
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: venv-dev ## let ruff format and repair what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: venv-dev ## run the benchmarks that need no GPU; a table each, and JSON on the last line
	$(PY) -m benchmarks.cpu.extract
	$(PY) -m benchmarks.cpu.decode

clean: ## remove .venv, caches and the demo's store
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist store
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
