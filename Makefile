PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup servers demo test test-slow chaos lint audit lock clean

help:  ## what can be made
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## .venv with the locked Python packages

$(READY): requirements-dev.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

servers:  ## RabbitMQ and PostgreSQL for the tests, where they are missing
	@.ci/install-servers

demo: setup  ## the whole system in one process: nothing to install but Python packages
	@$(BIN)/confirm-offer demo

test: setup servers  ## the tests, against private, throw-away RabbitMQ and PostgreSQL servers
	@PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow" $(ARGS)

test-slow: setup servers  ## the tests that take their time: chaos, interrupted commands, servers that crash
	@PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 3 --dist loadfile -m slow $(ARGS)

chaos: setup servers  ## 2000 jobs while workers, RabbitMQ, PostgreSQL and XONE fail at random; ARGS="--seed 1"
	@$(BIN)/python -m tests.chaos $(ARGS)

lint: setup audit  ## style and types, and whether a dependency has a known hole
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

AUDIT := $(BIN)/pip-audit --requirement requirements-tracing.lock --require-hashes --disable-pip --timeout 10

audit: setup
	@told=$$($(AUDIT) --progress-spinner off 2>&1); case "$$told" in \
	  *"Found "*" known vulnerabilit"*) echo "$$told"; exit 1;; \
	  *"No known vulnerabilities found"*) \
	    echo "no known holes; $$(echo "$$told" | grep -c 'could not be audited') dependencies could not be checked";; \
	  *) echo "the dependencies were not checked for known holes: no index can be reached";; \
	esac

COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
  --custom-compile-command "make lock" $(LOCK_ARGS) pyproject.toml

lock:  ## renew the lock files from pyproject.toml (needs uv)
	$(COMPILE) -o requirements.lock
	$(COMPILE) --extra tracing -c requirements.lock -o requirements-tracing.lock
	$(COMPILE) --extra dev --extra tracing -c requirements-tracing.lock -o requirements-dev.lock

clean:  ## everything that was made here
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
