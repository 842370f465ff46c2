# `make` lists what there is. Everything runs in a virtual environment, which is made on first use.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV ?= $(BIN)/uv
LOCK := requirements-dev.lock
# Of these the packages in the image; setuptools builds the project's own.
IMAGE_LOCK := requirements.lock
# And what it takes besides to compile it (setup.py).
COMPILE_LOCK := requirements-compile.lock
# A copy of the tree for it: in the tree itself an extension module would hide the .py beside it.
COMPILED := build/compiled
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
COMPOSE ?= $(if $(shell docker compose version 2>/dev/null),docker compose,docker-compose)
# More arguments for the program that a target runs: make test ARGS="-k scraper"
ARGS ?=
# Mooncake's conversation trace (FAST '25, kvcache-ai/Mooncake, FAST25-release/traces)
TRACE ?= ../shared/traces/mooncake_conversation.jsonl

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-compiled test-envoy-matrix snippets chaos fuzz soak image compose-up test-compose check docs docs-reference dist bench bench-lab bench-scheduling lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make the virtual environment (.venv) with everything in it

demo: venv ## a whole gateway with simulated engines, shown and checked; KEEP=1 leaves it running
	$(BIN)/python -m extproc.demo $(if $(filter-out 0,$(KEEP)),--keep) $(ARGS)

test: venv ## all tests, those with a real Envoy included
	$(BIN)/python -m pytest $(ARGS)

test-compiled: venv ## the same with the core compiled, in a copy of the tree (build/compiled); needs git, gcc and 40 s more
	rm -rf $(COMPILED)
	mkdir -p $(COMPILED)
	git ls-files -z --cached --others --exclude-standard | tar -c --null --files-from - --ignore-failed-read | tar -x -C $(COMPILED)
	cd $(COMPILED) && EXTPROC_COMPILE=1 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(COMPILED) && PYTHONPATH=$(CURDIR)/$(COMPILED) $(abspath $(BIN))/python -c 'import extproc.cli; extproc.cli.main(["--version"])'
	cd $(COMPILED) && PYTHONPATH=$(CURDIR)/$(COMPILED) $(abspath $(BIN))/python -m pytest $(ARGS)

test-envoy-matrix: venv ## the tests with an Envoy, for the supported versions; ARGS="--versions 1.36.2 --keyword attach"
	$(BIN)/python tests/matrix/run.py $(ARGS)

snippets: venv ## write envoy/filters/ and the printed parts of envoy/examples/ anew
	$(BIN)/python tests/envoy/update_snippets.py

chaos: venv ## break a gateway in every way there is, and print what was measured; takes minutes
	$(BIN)/python tests/chaos/run.py $(ARGS)

fuzz: venv ## odd input for everything that takes input; ARGS="--inputs 1000000 --targets request,exchange"; takes minutes
	-$(PIP) install --quiet --only-binary :all: --require-hashes --requirement tests/fuzz/requirements.txt
	$(BIN)/python tests/fuzz/run.py $(ARGS)

soak: venv ## 100,000 requests with faults, then nothing may be left or have grown; ARGS="--requests 5000"
	PYTHONPATH=tests/chaos $(BIN)/python tests/soak/run.py $(ARGS)

image: ## build the images: extproc (with Envoy, for `extproc up`) and extproc:service (for `docker compose`)
	docker build --tag extproc $(ARGS) .
	docker build --tag extproc:service --target service $(ARGS) .

compose-up: ## engines (simulated), service and Envoy in containers; Ctrl-C stops them
	$(COMPOSE) -f compose/docker-compose.yaml up --build $(ARGS)

test-compose: venv ## build the image and run it with Compose (needs a Docker engine)
	$(BIN)/python -m pytest tests/compose $(ARGS)

# Not with --quiet: that lets warnings pass.
docs: venv ## the documentation as a site, in site/; a warning is an error
	$(BIN)/python tools/docs_site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-reference: venv ## write docs/reference.md and docs/cli.md anew, from the code
	$(BIN)/python tools/docs_reference.py

dist: venv ## wheel and sdist, in dist/
	rm -rf dist build
	$(BIN)/python -m build $(ARGS)
	$(BIN)/python -m twine check --strict dist/*

check: venv ## lint, format, types, import contracts, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/docs_reference.py --check
	$(MAKE) --no-print-directory docs

bench: venv ## what the gateway costs, beside others; SMG_PYTHON=…, SGLANG_ROUTER_PYTHON=… (docs/performance.md); needs wrk, gcc
	$(BIN)/python tests/bench/performance.py $(ARGS)

bench-lab: venv ## the scheduling figures in virtual time, required and reached (TRACE: Mooncake's conversation trace)
	$(BIN)/python -m extproc.lab.acceptance --trace $(TRACE) --jobs 2 $(ARGS)

bench-scheduling: venv ## the same through real gateways in real time; SMG_PYTHON=…: smg 1.13.0, too (docs/scheduling.md)
	$(BIN)/python tests/bench/scheduling.py $(if $(wildcard $(TRACE)),--trace $(TRACE)) $(ARGS)

lock: venv ## write the lock files anew after a change of dependencies; ARGS=--upgrade for new versions
	@command -v $(UV) >/dev/null || $(PIP) install --quiet uv
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	  --no-emit-index-url --no-header $(ARGS) --output-file $(LOCK) pyproject.toml
	echo 'setuptools>=77' | $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra envoy \
	  --no-emit-index-url --no-header --no-annotate --constraint $(LOCK) --output-file $(IMAGE_LOCK) pyproject.toml -
	printf '%s\n' mypy types-PyYAML | $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --no-annotate --constraint $(LOCK) --output-file $(COMPILE_LOCK) -

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .cache .fuzz .soak
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Made anew only when the dependencies have changed. The lock file pins every package by its hash.
$(STAMP): pyproject.toml $(wildcard $(LOCK))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv."; exit 1; }
ifneq ($(wildcard $(LOCK)),)
	$(PIP) install --quiet --require-hashes --requirement $(LOCK)
	$(PIP) install --quiet --no-deps --editable .
else
	$(PIP) install --quiet --editable '.[envoy,dev]'
endif
	@touch $@
