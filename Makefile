# Bare `make` lists the targets. Each makes the environment first if it is not there yet.
.DEFAULT_GOAL := help
.PHONY: help setup repro chat ui recipes recipe status metrics plots experiments test test-quick test-image fuzz lint format lock sbom audit clean verify reproduce sign \
	bench bench-throughput image inside shell stop up down backup restore remote share fetch

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DOCKER ?= docker
PORT ?= 5000
MINUTES ?= 10
DONE := $(VENV)/.complete
# Inside the image the environment is there already.
ifdef IN_IMAGE
VENV := $(IN_IMAGE)
BIN := $(IN_IMAGE)/bin
DONE :=
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Tools that look after the lock files have an environment of their own, so that they are no part of what trains.
TOOLS := .scratch/tools
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)

# The environment's programs come first for everything that a target starts.
export PATH := $(abspath $(BIN)):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DONE) ## make the environment and MLflow's database (done by every target when needed)

.venv/.complete: docker/install docker/requirements.lock docker/torch.lock pyproject.toml
	@echo "making the environment in $(VENV); this takes some minutes once"
	@PYTHON=$(PYTHON) docker/install $(VENV)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --quiet --disable-pip-version-check
	@# First use by several processes at once would fail; a server of yours looks after its own database.
	@[ -n "$${MLFLOW_TRACKING_URI:-}" ] || $(BIN)/mlflow db upgrade sqlite:///$(CURDIR)/mlflow.db >/dev/null 2>&1
	@touch $@

repro: $(DONE) ## rebuild the whole pipeline: data, base, training, adapter, model, report
	@$(BIN)/remint check
	@$(BIN)/dvc repro
	-@$(BIN)/remint sync
	@$(BIN)/remint summary

chat: $(DONE) ## talk to the merged model
	@$(BIN)/remint chat $(ARGS)

ui: $(DONE) ## open MLflow on http://127.0.0.1:5000 (PORT=…)
	@$(BIN)/remint ui --port $(PORT)

recipes: $(DONE) ## list ready-made params.yaml files (PATTERN=internlm2)
	@$(BIN)/remint recipes $(PATTERN)

recipe: $(DONE) ## put one in place (NAME=smoke, FORCE=1 to overwrite changes of yours)
	@$(BIN)/remint recipe $(NAME) $(if $(FORCE),--force)

status: $(DONE) ## say which stages have changed; what depends on them would run, too
	@$(BIN)/dvc status

# DVC's own message says which files it misses, and not how to make them.
MEASURED = $(BIN)/dvc metrics show 2>/dev/null | grep -q merged || { echo "make $@: nothing was measured here yet; run \`make repro\`" >&2; exit 1; }

metrics: $(DONE) ## show the figures of the last run beside those of a commit (REV=HEAD~1)
	@$(MEASURED)
	@$(BIN)/dvc metrics diff --all $(REV)

plots: $(DONE) ## draw the curves into dvc_plots/index.html
	@$(MEASURED)
	@$(BIN)/dvc plots show

experiments: $(DONE) ## compare experiments in a table
	@# The figures that one chooses by; `dvc exp show` has the rest.
	@$(BIN)/dvc exp show --only-changed --drop 'base[.]|data/|src/|docker/|conf/' \
		--drop 'merged[.](control|(maker|leak)_|name$$)'
	@[ -n "$$($(BIN)/dvc exp list --names-only 2>/dev/null)" ] || echo "no experiments yet; \`dvc exp run -S train.lr=1e-3\` makes one"

verify: $(DONE) ## recompute every artefact's checksums, check provenance and signature
	@$(BIN)/remint verify

reproduce: $(DONE) ## rebuild the last commit elsewhere, compare every byte (TIMES=2, VARY=1: in other surroundings)
	@$(BIN)/remint reproduce $(if $(TIMES),--times $(TIMES)) $(if $(VARY),--vary)

sign: $(DONE) ## sign the model with an SSH key (KEY=~/.ssh/id_ed25519)
	@$(BIN)/remint sign $(KEY)

image: ## build the container image and the one of MLflow's server (BASE=… to build on, CPU=1 without CUDA)
	@$(PYTHON) docker/build $(IMAGES)

inside: ## run another target as a whole in one container: nothing but the image is needed (TARGET=repro)
	@RUNNER=docker docker/run make --no-print-directory $(or $(TARGET),repro)

shell: ## open a shell in the image
	@RUNNER=docker docker/run sh

stop: ## end every container that works in this folder; what was trained stays
	@command -v $(DOCKER) >/dev/null || { echo "make stop: $(DOCKER) was not found; name the engine by DOCKER=…" >&2; exit 1; }
	@for id in $$($(DOCKER) container ls --all --quiet --filter "label=remint.root=$$(pwd -P)"); do \
		$(DOCKER) stop $$id >/dev/null; $(DOCKER) rm --force $$id >/dev/null 2>&1 || true; done

up: ## serve MLflow on PostgreSQL, on loopback (CHAT=1: the chat server too, AUTH=1: with a password)
	@docker/stack up

down: ## end what `make up` started; its data stays
	@docker/stack down

backup: ## save the server's runs and artifacts into one file (FILE=…)
	@docker/stack backup $(FILE)

restore: ## put such a file back in place of what is there (FILE=…)
	@docker/stack restore $(FILE)

# What DVC needs for SSH and S3 is locked apart, for a change to the main lock reruns the stages.
TRANSPORTS = case "$(URL) $$($(BIN)/dvc remote list)" in *ssh://* | *s3://*) \
	$(PIP) --require-hashes --no-deps --requirement docker/remotes.lock ;; esac

remote: $(DONE) ## choose where data is shared (URL=/folder, ssh://…, s3://… with ENDPOINT=…, https://…)
	@[ -n "$(URL)" ] || { echo "make remote: needs a place, got none; add URL=/mnt/team/remint or URL=ssh://server/data" >&2; exit 1; }
	@$(TRANSPORTS)
	@$(BIN)/dvc remote add --quiet --force --default team "$(URL)"
	@$(BIN)/dvc remote modify team verify true
	@$(if $(ENDPOINT),$(BIN)/dvc remote modify team endpointurl "$(ENDPOINT)")
	@$(if $(filter http%,$(URL)),$(BIN)/dvc remote modify team method PUT)

share: $(DONE) ## bring everything that was built there, results of experiments too
	@$(TRANSPORTS)
	@$(BIN)/dvc push --run-cache

fetch: $(DONE) ## get everything from there: nothing is trained again
	@$(TRANSPORTS)
	@$(BIN)/dvc pull --run-cache

test: $(DONE) ## the quick suite, then the pipeline end to end on a tiny real model
	$(BIN)/python -m pytest -q -m "not slow and not engine"
	@bash tests/slow.sh $(BIN)/python

test-quick: $(DONE) ## the quick suite alone
	$(BIN)/python -m pytest -q -m "not slow and not engine"

test-image: $(DONE) ## the same pipeline in the image, and what is served from images (after `make image`)
	$(BIN)/python -m pytest -q -m engine

fuzz: $(DONE) ## feed every reader spoilt input, new each time (MINUTES=10)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
		FUZZ_EXAMPLES=500 $(BIN)/python -m pytest -q tests/fuzz || exit 1; done

bench: $(DONE) ## time training beside that of other projects (STEPS=8, ROWS=…, SEED=…, ONLY="remint trl", SHAPE=…, NATIVE=1: past AVX2)
	@$(BIN)/python benchmarks/peers.py $(if $(STEPS),--steps $(STEPS)) $(if $(SHAPE),--shape $(SHAPE)) $(if $(NATIVE),--native) \
		$(if $(ROWS),--rows $(ROWS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(ONLY),--only $(ONLY),--plot docs/bench.svg)

bench-throughput: $(DONE) ## time everything but training over growing sizes (PARTS="merge hashing")
	@$(BIN)/python benchmarks/throughput.py $(if $(PARTS),--parts $(PARTS),--plot docs/throughput.svg)

lint: $(DONE) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DONE) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(TOOLS)/.complete: docker/tools.lock
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement docker/tools.lock
	@touch $@

lock: $(TOOLS)/.complete ## write the lock files for pyproject.toml (UPGRADE=1: with the newest versions)
	@cat docker/requirements.lock docker/torch.lock > .scratch/pins
	@echo setuptools | $(COMPILE) --extra dev --output-file .scratch/pins pyproject.toml -
	@# CUDA's packages come with the build of torch that needs them, in the versions that it names.
	@grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' .scratch/pins \
		| $(COMPILE) --no-deps --generate-hashes --output-file docker/requirements.lock -
	@grep '^torch==' .scratch/pins | $(COMPILE) --no-deps --output-file docker/torch.lock -
	@$(COMPILE) --generate-hashes --output-file docker/tools.lock --group pyproject.toml:supply-chain
	@# What MLflow's server and DVC's remotes need besides, in the versions that the stages have.
	@sed 's/ *\\$$//; /--hash/d' docker/requirements.lock > .scratch/constraints
	@for group in server remotes; do $(COMPILE) --generate-hashes --constraint .scratch/constraints \
		--output-file docker/$$group.lock --group pyproject.toml:$$group || exit 1; done

sbom: $(TOOLS)/.complete ## list the locked packages as CycloneDX in sbom.cdx.json
	@cat docker/requirements.lock docker/torch.lock | $(TOOLS)/bin/python -W ignore::UserWarning -m cyclonedx_py requirements \
		--pyproject pyproject.toml --output-reproducible --short-PURLs --output-file sbom.cdx.json -

audit: $(TOOLS)/.complete ## look up known vulnerabilities of the locked packages (asks api.osv.dev)
	@sed -n 's/ *\\$$//; /^[a-z]/p' docker/requirements.lock docker/torch.lock > .scratch/audit.txt
	@# Not the package index: a mirror of it may answer without the advisories, which would read like "none known".
	@if $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --vulnerability-service osv \
		--requirement .scratch/audit.txt > .scratch/audit.out 2> .scratch/audit.log; then tail -n 1 .scratch/audit.log; \
	elif [ -s .scratch/audit.out ]; then cat .scratch/audit.out; exit 1; \
	else echo "error: audit: the vulnerability service gave no answer, so nothing is known;" \
		"run it where api.osv.dev can be reached, .scratch/audit.log has the cause" >&2; exit 1; fi

clean: ## remove unfinished work and what the tools left; data and experiments stay
	rm -rf .scratch .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info dvc_plots sbom.cdx.json
