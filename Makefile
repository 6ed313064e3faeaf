# Bare `make` lists the targets. Each makes the environment first if it is not there yet.
.DEFAULT_GOAL := help
.PHONY: help setup repro chat ui recipes recipe status metrics plots experiments test test-quick lint format lock clean verify

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PORT ?= 5000
DONE := $(VENV)/.complete

# The environment's programs come first for everything that a target starts.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DONE) ## make the environment and MLflow's database (done by every target when needed)

$(DONE): docker/requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; say PYTHON=python3.11" % v[:2])'
	@echo "making the environment in $(VENV); this takes some minutes once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement docker/requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@# First use by several processes at once would fail; a server of yours looks after its own database.
	@[ -n "$${MLFLOW_TRACKING_URI:-}" ] || $(BIN)/mlflow db upgrade sqlite:///$(CURDIR)/mlflow.db >/dev/null 2>&1
	@touch $(DONE)

repro: $(DONE) ## rebuild the whole pipeline: data, base, training, adapter, model, report
	@$(BIN)/dvc repro
	@$(BIN)/remint sync
	@$(BIN)/remint summary

chat: $(DONE) ## talk to the merged model
	@$(BIN)/remint chat $(ARGS)

ui: $(DONE) ## open MLflow on http://127.0.0.1:5000 (PORT=…)
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1 --port $(PORT) \
		--allowed-hosts "127.0.0.1:$(PORT),localhost:$(PORT)"

recipes: $(DONE) ## list ready-made params.yaml files (PATTERN=internlm2)
	@$(BIN)/remint recipes $(PATTERN)

recipe: $(DONE) ## put one in place (NAME=smoke, FORCE=1 to overwrite changes of yours)
	@$(BIN)/remint recipe $(NAME) $(if $(FORCE),--force)

status: $(DONE) ## say which stages would run
	@$(BIN)/dvc status

metrics: $(DONE) ## show the figures of the last run beside those of a commit (REV=HEAD~1)
	@$(BIN)/dvc metrics diff --all $(REV)

plots: $(DONE) ## draw the curves into dvc_plots/index.html
	@$(BIN)/dvc plots show

experiments: $(DONE) ## compare experiments in a table
	@# The figures that one chooses by; `dvc exp show` has the rest.
	@$(BIN)/dvc exp show --only-changed --drop 'base[.]|data/|src/|docker/|conf/' \
		--drop 'merged[.](control|(maker|leak)_|name$$)'

verify: $(DONE) ## recompute every artefact's checksums
	@$(BIN)/remint verify

test: $(DONE) ## the quick suite, then the pipeline end to end on a tiny real model
	$(BIN)/python -m pytest -q -m "not slow"
	$(BIN)/python -m pytest -q -m slow

test-quick: $(DONE) ## the quick suite alone
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(DONE) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DONE) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## write docker/requirements.lock anew from pyproject.toml
	rm -rf .scratch/lock && $(PYTHON) -m venv .scratch/lock
	.scratch/lock/bin/pip install --quiet --disable-pip-version-check '.[dev]' setuptools
	(echo "# Every package of the environment, pinned. Made by \`make lock\`; pyproject.toml says what is wanted."; \
		.scratch/lock/bin/pip freeze --all | grep -v -i -E '^(pip|remint)[= ]' | sed 's/+cpu$$//') > docker/requirements.lock
	rm -rf .scratch/lock

clean: ## remove unfinished work and what the tools left; data and experiments stay
	rm -rf .scratch .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info dvc_plots
