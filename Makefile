.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"ullme needs Python 3.11 or later, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.PHONY: setup
setup: $(VENV)/installed  ## make the environment (.venv)

.PHONY: quickstart
quickstart: setup  ## train GRL on the built-in corpus, evaluate, export, search: minutes on two CPU cores
	$(RUN) train.py fit --config quickstart.yaml
	$(RUN) evaluate.py --model bm25 base:runs/quickstart/export runs/quickstart/export --tasks docs --output runs/quickstart/results \
	  --search "shortest path between two nodes" "solve a linear system" "random numbers from a normal distribution"

.PHONY: test
test: setup  ## the tests (25 representative decoder families)
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(RUN) -m pytest -n 2

.PHONY: test-all
test-all: setup  ## the tests with every decoder family that transformers can build
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(RUN) -m pytest -n 2
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(RUN) -m pytest -m sweep

.PHONY: lint
lint: setup  ## ruff, mypy, typos
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/typos

.PHONY: format
format: setup  ## let ruff rewrite the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: pretrain
pretrain: setup  ## reproduce the recipe of the built-in language model (about an hour)
	$(RUN) scripts/pretrain.py

.PHONY: clean
clean:  ## remove runs and caches, keep the environment
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
