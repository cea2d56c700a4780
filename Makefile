# Every target that runs something depends on `install`, which does nothing if nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The interpreter of .venv: by default the first of these that is 3.11 or newer and has venv.
PYTHON ?=
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

BIN := .venv/bin
UNUSED := /(tests?|testing|rllib|sympy|_inductor|onnx|transformers/models)/

.PHONY: help install demo bench bench-methods bench-methods-chat test test-exactness test-chaos test-load test-cluster simulate simulate-planted mutants check format proto train audit sbom clean test-random soak

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## create .venv with the command .venv/bin/outrider

demo: install ## show a chat model (fetched, else the shipped pair) with and without speculation: same text, two speeds
	@$(BIN)/python -m actors.cli.demo

# Prompts of the real model: by default those in bench/chat_prompts.jsonl
BENCH ?= --count 12 --batch 8 --batch 16
bench: install ## compare all ways to use the same models and cores, on a real model first; 90 minutes on two cores
	@if $(BIN)/outrider pull smollm2-135m; then $(BIN)/python -m bench --target smollm2-135m --draft eagle --llama-cpp $(BENCH); \
	else echo "SmolLM2 cannot be fetched: the pair that ships is measured alone"; fi
	@$(BIN)/python -m bench

bench-methods: install ## compare all drafting methods, alone and combined; 20 minutes
	@$(BIN)/python -m bench.methods
	@$(BIN)/python -m experiments.same_tree

bench-methods-chat: install ## compare the drafting methods on SmolLM2, 24 questions; 15 minutes
	@$(BIN)/outrider pull smollm2-135m && $(BIN)/python -m bench.methods --target smollm2-135m --count 24

test: install ## run all tests on up to four cores
	$(BIN)/pytest -q --durations=10 --numprocesses auto --maxprocesses 4

SEED ?= # make test-random SEED=7 repeats a run

test-random: install ## run the property tests on examples of a random seed, which is printed; nightly; 5 minutes
	@seed='$(SEED)'; seed=$${seed:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; \
	echo "seed $$seed; to repeat: make test-random SEED=$$seed"; \
	$(BIN)/pytest -q --durations=10 --numprocesses auto --maxprocesses 4 --hypothesis-seed="$$seed" \
	  $$(grep -rlE '^(from|import) hypothesis' tests --include='test_*.py') || \
	  { echo "make test-random: failed with seed $$seed; to repeat: make test-random SEED=$$seed" >&2; exit 1; }

test-exactness: install ## test exactness for all model families, drafters and trees, before a release; 5 minutes
	OUTRIDER_TEST_EXHAUSTIVE=1 $(BIN)/pytest -q --durations=10 --numprocesses auto --maxprocesses 4 --dist load tests/contracts/test_exactness.py

# Sizes of the next two. Smaller: make test-chaos CHAOS_SECONDS=60
CHAOS_STREAMS ?= 200
CHAOS_SECONDS ?= 240
SCALE_SECONDS ?= 205
BATCH_ITEMS ?= 500
BATCH_KILLS ?= 5
LOAD_CLIENTS ?= 1000
LOAD_MALFORMED ?= 5000

test-chaos: install ## kill and stop processes under 200 streams, scale drafters under 20, kill all under a batch; 20 minutes
	@mkdir -p build
	@failed=0; \
	$(BIN)/python -m bench.chaos --streams $(CHAOS_STREAMS) --seconds $(CHAOS_SECONDS) --json build/chaos-blows.json || failed=1; \
	$(BIN)/python -m bench.chaos --streams 20 --seconds $(SCALE_SECONDS) --targets 1 --drafters 1 --scale 4 --every 4 --json build/chaos-scale.json || failed=1; \
	$(BIN)/python -m bench.chaos.batch --items $(BATCH_ITEMS) --kills $(BATCH_KILLS) --json build/chaos-batch.json || failed=1; \
	exit $$failed

test-load: install ## test gateway overhead, tenfold overload, disconnects and malformed requests; 15 minutes
	@mkdir -p build
	@failed=0; \
	$(BIN)/python -m bench.load --clients $(LOAD_CLIENTS) --json build/load.json || failed=1; \
	OUTRIDER_TEST_DISCONNECTS=$(LOAD_CLIENTS) OUTRIDER_TEST_MALFORMED=$(LOAD_MALFORMED) OUTRIDER_FUZZ=$(LOAD_MALFORMED) $(BIN)/pytest -q --durations=10 \
	  -o faulthandler_timeout=0 tests/actors/gateway/test_life.py tests/actors/gateway/test_fuzz.py tests/actors/rpc/test_fuzz_wire.py || failed=1; \
	exit $$failed

SEEDS ?= 10000

simulate: install ## simulate deployments with faults on a virtual clock, SEEDS=10000 of them, on all cores
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

simulate-planted: install ## plant each known fault in the product: the simulation must find it within 10,000 seeds
	$(BIN)/python -m tests.simulation --plant all

HOURS ?= 12 # make soak HOURS=0.5

soak: install ## mixed traffic with a fault each minute for HOURS; fails if memory, files, threads or sessions grow, or a text differs
	$(BIN)/python -m bench.soak --hours $(HOURS) --out build/soak

CLUSTER ?= # make test-cluster CLUSTER=short runs a part in about three minutes

test-cluster: install ## run the on-premise cluster file on hosts made of network namespaces (needs root); 25 minutes
	$(BIN)/python -m tests.system.cluster.try_cluster $(CLUSTER)

# Which files: FILES="tree runtime/kv/*", FILES=all; by default those changed since BASE
FILES ?=
BASE ?= main
MUTANTS ?= 100
mutants: install ## change the code in one place at a time and look whether its tests notice; changed files only
	@$(BIN)/python -m tests.mutation --files "$(FILES)" --base $(BASE) --most $(MUTANTS)

check: install ## check format, lint, types, import layers and generated code; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py
	$(BIN)/python -m protos.generate --check

format: install ## format the sources and apply safe lint fixes
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

proto: install ## regenerate the code from protos/*.proto
	$(BIN)/python -m protos.generate

train: install ## train the shipped pair; takes hours, resumes after an interruption
	$(BIN)/python -m training.shipped

# The tools of these two have more dependencies than the project, so they get a separate
# environment. ADVISORIES names the source: pypi (an index with advisories; many mirrors have none)
# or osv. A package without advisory data is a failure, not a pass.
AUDITORS := pip-audit==2.10.1 cyclonedx-bom==7.5.0
ADVISORIES ?= pypi

audit: build/audit/installed ## list known vulnerabilities of the pinned packages; needs the network
	@build/audit/bin/pip-audit --strict --progress-spinner off -s $(ADVISORIES) --no-deps --disable-pip -r constraints.txt || \
	  { echo "make audit: vulnerabilities or missing advisories, see above; if the index has no advisories, try ADVISORIES=osv" >&2; exit 1; }

sbom: install build/audit/installed ## write build/sbom.json (CycloneDX): every package of .venv with version and licence
	build/audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --of JSON -o build/sbom.json

clean: ## remove .venv, caches and build results (not build/train with hours of training)
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
	  echo "outrider needs Python 3.11 or newer with venv; not found among [$(or $(PYTHON),$(PYTHONS))]: run make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	if [[ ! -x $(BIN)/pip ]]; then echo "$$python -m venv .venv"; $$python -m venv .venv; fi
	@echo 'installing the pinned packages: one to three minutes, longer if torch must be downloaded'
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# Compile on all cores (pip uses one), without modules that no start loads. Ray gives its agents only seconds to start.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' .venv/lib || true # some files need other Python versions
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import ray, transformers.models.llama.modeling_llama'
	@touch $@
