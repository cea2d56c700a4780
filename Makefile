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

.PHONY: help install demo bench test check format proto train clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv with the command .venv/bin/outrider in it

demo: install ## the pair that ships writes Python code, guessed ahead and then plainly: same text, the speed-up
	@$(BIN)/python -m bench.demo

bench: install ## compare with every other way to use the same models and cores: about half an hour on two cores
	@$(BIN)/python -m bench

test: install ## all tests
	$(BIN)/pytest -q --durations=10

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
	$(BIN)/python -m models.train

clean: ## remove .venv, caches and build results (not build/train, which holds hours of training)
	rm -rf .venv dist build/lib build/bdist.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

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
	@echo "installing the pinned dependencies into .venv (one to three minutes)"
	@echo 'installing the pinned packages: one to three minutes, more where torch has to be fetched'
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# Compiled on all cores, where pip would use one, and without what no start loads. Ray gives its agents only seconds to start.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' .venv/lib || true # some files are for other Pythons
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import ray, transformers.models.llama.modeling_llama'
	@touch $@
