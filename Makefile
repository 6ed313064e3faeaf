# Bare `make` lists the targets. Each target first creates the environment if it does not exist.
.DEFAULT_GOAL := help
.PHONY: help setup repro chat ui recipes recipe status metrics plots experiments test test-quick test-image fuzz soak lint format lock sbom audit clean verify reproduce sign \
	bench bench-throughput bench-gpus pictures image inside shell stop up down backup restore remote share fetch

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
DOCKER ?= docker
PORT ?= 5000
MINUTES ?= 10
DONE := $(VENV)/.complete
# The image already contains the environment.
ifdef IN_IMAGE
VENV := $(IN_IMAGE)
BIN := $(IN_IMAGE)/bin
DONE :=
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tools for the lock files have their own environment, so that the training environment does not contain them.
TOOLS := .scratch/tools
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)

# Every command of a target finds the environment's programs first.
export PATH := $(abspath $(BIN)):$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DONE) ## create the environment and MLflow's database (other targets do this when needed)

.venv/.complete: docker/install docker/requirements.lock docker/torch.lock pyproject.toml
	@echo "creating the environment in $(VENV); this takes a few minutes, once"
	@PYTHON=$(PYTHON) docker/install $(VENV)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --quiet --disable-pip-version-check
	@# Create the database now: several processes creating it at once would fail. A tracking server has its own database.
	@$(BIN)/python -m remint.runner.prepare
	@touch $@

repro: $(DONE) ## rebuild the entire pipeline: data, base, training, adapter, model, report
	@$(BIN)/remint check
	@$(BIN)/dvc repro
	@$(BIN)/remint sync || true  # its message says what to do; make would add another
	@$(BIN)/remint summary

chat: $(DONE) ## talk to the merged model
	@$(BIN)/remint chat $(ARGS)

ui: $(DONE) ## start MLflow's web UI on http://127.0.0.1:5000 (PORT=…)
	@$(BIN)/remint ui --port $(PORT)

recipes: $(DONE) ## list ready-made params.yaml files (PATTERN=internlm2)
	@$(BIN)/remint recipes $(PATTERN)

recipe: $(DONE) ## replace params.yaml by a recipe (NAME=smoke, FORCE=1 to overwrite your own changes)
	@$(BIN)/remint recipe $(NAME) $(if $(FORCE),--force)

status: $(DONE) ## list the changed stages; stages that depend on them would run, too
	@$(BIN)/dvc status

# Without this check, DVC's message would name the missing files, but not the command that makes them.
MEASURED = $(BIN)/dvc metrics show 2>/dev/null | grep -q merged || { echo "make $@: there are no metrics yet; run \`make repro\`" >&2; exit 1; }

metrics: $(DONE) ## compare the metrics of the last run with those of a commit (REV=HEAD~1)
	@$(MEASURED)
	@$(BIN)/dvc metrics diff --all $(REV)

plots: $(DONE) ## draw the curves into dvc_plots/index.html
	@$(MEASURED)
	@$(BIN)/dvc plots show

experiments: $(DONE) ## compare experiments in a table
	@# Show only the metrics that help to choose an experiment; `dvc exp show` shows all.
	@$(BIN)/dvc exp show --only-changed --drop 'base[.]|data/|src/|docker/|conf/' \
		--drop 'merged[.](control|(maker|leak)_|name$$)'
	@[ -n "$$($(BIN)/dvc exp list --names-only 2>/dev/null)" ] || echo "no experiments yet; \`dvc exp run -S train.lr=1e-3\` makes one"

verify: $(DONE) ## recompute every artefact's checksums, check provenance and signature
	@$(BIN)/remint verify

reproduce: $(DONE) ## rebuild the last commit elsewhere, compare every byte (TIMES=2, VARY=1: vary the environment)
	@$(BIN)/remint reproduce $(if $(TIMES),--times $(TIMES)) $(if $(VARY),--vary)

sign: $(DONE) ## sign the model with an SSH key (KEY=~/.ssh/id_ed25519)
	@$(BIN)/remint sign $(KEY)

image: ## build the images of the stages and of MLflow's server (BASE=… base image, CPU=1 without CUDA)
	@$(PYTHON) docker/build $(IMAGES)

inside: ## run another target in one container; only the image is needed (TARGET=repro)
	@RUNNER=docker docker/run make --no-print-directory $(or $(TARGET),repro)

shell: ## open a shell in the image
	@RUNNER=docker docker/run sh

stop: ## stop every container that works in this folder; finished steps are kept
	@command -v $(DOCKER) >/dev/null || { echo "make stop: $(DOCKER) was not found; name the engine with DOCKER=…" >&2; exit 1; }
	@for id in $$($(DOCKER) container ls --all --quiet --filter "label=remint.root=$$(pwd -P)"); do \
		$(DOCKER) stop $$id >/dev/null; $(DOCKER) rm --force $$id >/dev/null 2>&1 || true; done

up: ## serve MLflow on PostgreSQL, on loopback (CHAT=1: also the chat server, AUTH=1: with a password)
	@docker/stack up

down: ## stop what `make up` started; its data is kept
	@docker/stack down

backup: ## save the server's runs and artifacts to one file (FILE=…)
	@docker/stack backup $(FILE)

restore: ## replace the server's runs and artifacts by those of a backup (FILE=…)
	@docker/stack restore $(FILE)

# DVC's packages for SSH and S3 have their own lock file: a change to the main lock file reruns the stages.
TRANSPORTS = case "$(URL) $$($(BIN)/dvc remote list)" in *ssh://* | *s3://*) \
	$(PIP) --require-hashes --no-deps --requirement docker/remotes.lock ;; esac

remote: $(DONE) ## set where data is shared (URL=/folder, ssh://…, s3://… with ENDPOINT=…, https://…)
	@[ -n "$(URL)" ] || { echo "make remote: needs a URL, got none; add URL=/mnt/team/remint or URL=ssh://server/data" >&2; exit 1; }
	@$(TRANSPORTS)
	@$(BIN)/dvc remote add --quiet --force --default team "$(URL)"
	@$(BIN)/dvc remote modify team verify true
	@$(if $(ENDPOINT),$(BIN)/dvc remote modify team endpointurl "$(ENDPOINT)")
	@$(if $(filter http%,$(URL)),$(BIN)/dvc remote modify team method PUT)

share: $(DONE) ## push everything that was built to the remote, including experiments
	@$(TRANSPORTS)
	@$(BIN)/remint verify --run-cache
	@$(BIN)/dvc push --run-cache

fetch: $(DONE) ## pull everything from the remote, so that nothing is trained again
	@$(TRANSPORTS)
	@$(BIN)/dvc pull --run-cache

test: test-quick ## the quick suite, then the pipeline end to end on a tiny real model
	@bash tests/halves.sh $(BIN)/python slow tests/test_end_to_end.py tests/test_kills.py

test-quick: $(DONE) ## only the quick suite
	@bash tests/halves.sh $(BIN)/python "not slow and not engine and not soak" \
		tests/runner tests/test_inputs.py tests/test_pipeline.py tests/test_bench_gpus.py tests/test_container.py

test-image: $(DONE) ## the same pipeline in the image, and the servers (after `make image`)
	$(BIN)/python -m pytest -q -m engine

fuzz: $(DONE) ## feed every reader corrupted input, different each time (MINUTES=10)
	@end=$$(($$(date +%s) + 60 * $(MINUTES))); while [ $$(date +%s) -lt $$end ]; do \
		FUZZ_EXAMPLES=500 $(BIN)/python -m pytest -q tests/fuzz tests/test_generated_faults.py || exit 1; done

soak: $(DONE) ## use everything for a day in minutes: kills, restarts, hostile requests (SEED=…, SCALE=0.1)
	@$(BIN)/python -m tests.soak $(if $(SEED),--seed $(SEED)) $(if $(SCALE),--scale $(SCALE))

bench: $(DONE) ## compare training speed with other projects (STEPS=8, ROWS=…, SEED=…, ONLY="remint trl", SHAPE=…, NATIVE=1)
	@$(BIN)/python benchmarks/peers.py $(if $(STEPS),--steps $(STEPS)) $(if $(SHAPE),--shape $(SHAPE)) $(if $(NATIVE),--native) \
		$(if $(ROWS),--rows $(ROWS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(ONLY),--only $(ONLY),--plot docs/bench.svg)

bench-throughput: $(DONE) ## time everything except training on growing inputs (PARTS="merge hashing")
	@$(BIN)/python benchmarks/throughput.py $(if $(PARTS),--parts $(PARTS),--plot docs/throughput.svg)

bench-gpus: $(DONE) ## train with 1, 2, 4 and 8 GPUs: the same bytes, how many times the speed (SHAPES=…, PROCESSES="1 2", PARTS=…, STEPS=…)
	@$(BIN)/python benchmarks/gpus.py $(if $(SHAPES),--shapes $(SHAPES)) $(if $(PROCESSES),--processes $(PROCESSES)) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(STEPS),--steps $(STEPS))

pictures: $(DONE) ## draw the README's pictures from data/ and MLflow's store (needs chromium)
	@$(BIN)/python docs/pictures.py

lint: $(DONE) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DONE) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(TOOLS)/.complete: docker/tools.lock
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement docker/tools.lock
	@touch $@

lock: $(TOOLS)/.complete ## write the lock files for pyproject.toml (UPGRADE=1: newest versions)
	@cat docker/requirements.lock docker/torch.lock > .scratch/pins
	@echo setuptools | $(COMPILE) --extra dev --output-file .scratch/pins pyproject.toml -
	@# CUDA's packages are left out: torch's own build requires the ones it needs, in exact versions.
	@grep -v -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' .scratch/pins \
		| $(COMPILE) --no-deps --generate-hashes --output-file docker/requirements.lock -
	@grep '^torch==' .scratch/pins | $(COMPILE) --no-deps --output-file docker/torch.lock -
	@$(COMPILE) --generate-hashes --output-file docker/tools.lock --group pyproject.toml:supply-chain
	@# The additional packages of MLflow's server and DVC's remotes, with shared packages in the stages' versions.
	@sed 's/ *\\$$//; /--hash/d' docker/requirements.lock > .scratch/constraints
	@for group in server remotes; do $(COMPILE) --generate-hashes --constraint .scratch/constraints \
		--output-file docker/$$group.lock --group pyproject.toml:$$group || exit 1; done

sbom: $(TOOLS)/.complete ## write the locked packages as a CycloneDX SBOM to sbom.cdx.json
	@cat docker/requirements.lock docker/torch.lock | $(TOOLS)/bin/python -W ignore::UserWarning -m cyclonedx_py requirements \
		--pyproject pyproject.toml --output-reproducible --short-PURLs --output-file sbom.cdx.json -

audit: $(TOOLS)/.complete ## look up known vulnerabilities of the locked packages (at api.osv.dev)
	@sed -n 's/ *\\$$//; /^[a-z]/p' docker/requirements.lock docker/torch.lock > .scratch/audit.txt
	@# Not the package index: a mirror may leave out the advisories, which would look like "no known vulnerabilities".
	@if $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --vulnerability-service osv \
		--requirement .scratch/audit.txt > .scratch/audit.out 2> .scratch/audit.log; then tail -n 1 .scratch/audit.log; \
	elif [ -s .scratch/audit.out ]; then cat .scratch/audit.out; exit 1; \
	else echo "error: audit: the vulnerability service did not answer, so nothing is known;" \
		"run it where api.osv.dev is reachable; .scratch/audit.log has the cause" >&2; exit 1; fi

clean: ## remove unfinished work and tool caches; data and experiments are kept
	rm -rf .scratch .pytest_cache .mypy_cache .ruff_cache src/*.egg-info dvc_plots sbom.cdx.json
