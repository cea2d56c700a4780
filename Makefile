# Every target that runs something begins with `install`, which does nothing when nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The interpreter that .venv is made with: by default the first of these that is 3.11 or newer and can make one.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

BIN := .venv/bin
UNUSED := /(tests?|testing|rllib|sympy|_inductor|onnx|transformers/models)/

.PHONY: help install demo bench bench-methods test test-exactness test-chaos test-load test-cluster check format proto train audit sbom clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv with the command .venv/bin/outrider in it

demo: install ## the pair that ships writes Python code, guessed ahead and then plainly: same text, the speed-up
	@$(BIN)/python -m actors.cli.demo

bench: install ## compare with every other way to use the same models and cores: about half an hour on two cores
	@$(BIN)/python -m bench

bench-methods: install ## compare all ways to guess, alone and beside the draft model: about twenty minutes
	@$(BIN)/python -m bench.methods
	@$(BIN)/python -m experiments.same_tree

test: install ## all tests, on up to four cores
	$(BIN)/pytest -q --durations=10 --numprocesses auto --maxprocesses 4

test-exactness: install ## the whole product of model families, drafters and trees, before a release; 5 minutes
	OUTRIDER_TEST_EXHAUSTIVE=1 $(BIN)/pytest -q --durations=10 --numprocesses auto --maxprocesses 4 --dist load tests/contracts/test_exactness.py

# Sizes of these two, to be had smaller: make test-chaos CHAOS_SECONDS=60
CHAOS_STREAMS ?= 200
CHAOS_SECONDS ?= 240
SCALE_SECONDS ?= 205
BATCH_ITEMS ?= 500
BATCH_KILLS ?= 5
LOAD_CLIENTS ?= 1000
LOAD_MALFORMED ?= 5000

test-chaos: install ## kill and stop targets and drafters under 200 streams, change their number under 20, kill everything under a batch; 20 minutes
	@mkdir -p build
	@failed=0; \
	$(BIN)/python -m bench.chaos --streams $(CHAOS_STREAMS) --seconds $(CHAOS_SECONDS) --json build/chaos-blows.json || failed=1; \
	$(BIN)/python -m bench.chaos --streams 20 --seconds $(SCALE_SECONDS) --targets 1 --drafters 1 --scale 4 --every 4 --json build/chaos-scale.json || failed=1; \
	$(BIN)/python -m bench.chaos.batch --items $(BATCH_ITEMS) --kills $(BATCH_KILLS) --json build/chaos-batch.json || failed=1; \
	exit $$failed

test-load: install ## what the gateway adds, ten times too many requests, clients that leave; thousands of malformed ones; 15 minutes
	@mkdir -p build
	@failed=0; \
	$(BIN)/python -m bench.load --clients $(LOAD_CLIENTS) --json build/load.json || failed=1; \
	OUTRIDER_TEST_DISCONNECTS=$(LOAD_CLIENTS) OUTRIDER_TEST_MALFORMED=$(LOAD_MALFORMED) OUTRIDER_FUZZ=$(LOAD_MALFORMED) $(BIN)/pytest -q --durations=10 \
	  -o faulthandler_timeout=0 tests/actors/gateway/test_life.py tests/actors/gateway/test_fuzz.py tests/actors/rpc/test_fuzz_wire.py || failed=1; \
	exit $$failed

CLUSTER ?= # make test-cluster CLUSTER=short is a part of it, in some three minutes

test-cluster: install ## the on-premise cluster file for real, on hosts made of namespaces (needs root): 25 minutes
	$(BIN)/python -m tests.system.cluster.try_cluster $(CLUSTER)

check: install ## format, lint, types, import layers, freshness of generated code; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py
	$(BIN)/python -m protos.generate --check

format: install ## rewrite the sources in the project's format, with the lint's safe repairs
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

proto: install ## write the code generated from protos/*.proto anew
	$(BIN)/python -m protos.generate

train: install ## train the pair that ships (hours; goes on where it was interrupted)
	$(BIN)/python -m training.shipped

# The tools for these two know more packages than the project does, so they live in an environment of their own. ADVISORIES names who is
# asked: pypi (an index that serves advisories too; many mirrors do not) or osv. A package that nobody knows of is a failure, not a pass.
AUDITORS := pip-audit==2.10.1 cyclonedx-bom==7.5.0
ADVISORIES ?= pypi

audit: build/audit/installed ## known vulnerabilities of the pinned packages; needs the network
	@build/audit/bin/pip-audit --strict --progress-spinner off -s $(ADVISORIES) --no-deps --disable-pip -r constraints.txt || \
	  { echo "make audit: not audited, or not clean, see above; without advisories at the index try ADVISORIES=osv" >&2; exit 1; }

sbom: install build/audit/installed ## build/sbom.json (CycloneDX): every package of .venv with version and licence
	build/audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --of JSON -o build/sbom.json

clean: ## remove .venv, caches and build results (not build/train, which holds hours of training)
	rm -rf .venv dist build/lib build/bdist.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis build/audit build/sbom.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

build/audit/installed: Makefile | install
	$(BIN)/python -m venv --clear build/audit
	build/audit/bin/pip install -q --disable-pip-version-check $(AUDITORS)
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@python='$(PYTHON)'; \
	for candidate in $(PYTHONS); do \
	  if [[ -z $$python ]] && $$candidate -c '$(FITS)' 2>/dev/null; then python=$$candidate; fi; \
	done; \
	if [[ -z $$python ]] || ! $$python -c '$(FITS)'; then \
	  echo "outrider needs Python 3.11 or newer with venv; none of [$(or $(PYTHON),$(PYTHONS))] is: make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	if [[ ! -x $(BIN)/pip ]]; then echo "$$python -m venv .venv"; $$python -m venv .venv; fi
	@echo 'installing the pinned packages: one to three minutes, more where torch has to be fetched'
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# Compiled on all cores, where pip would use one, and without what no start loads. Ray gives its agents only seconds to start.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' .venv/lib || true # some files are for other Pythons
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import ray, transformers.models.llama.modeling_llama'
	@touch $@
