# make pretrain   a small PersonMAE run on synthetic pedestrians, from nothing, in minutes
# make finetune   that ViT learns known people, and one from scratch beside it
# make test       the whole suite; make test-fast leaves the slow tests out
# make lint       format, lint and types

# The first that runs; the newest jax needs 3.12, the pinned one is for 3.11.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c \
  'import sys, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
  2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN = $(VENV)/bin
WORKDIR ?= runs/quickstart

FINETUNE = $(BIN)/python launch/finetune.py --config=configs/finetune_quickstart.py

# On Linux XLA's buffers come in huge pages: half the time in the kernel, 10 % faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: pretrain finetune test test-fast lint clean

pretrain: $(VENV)/.installed
	$(BIN)/python launch/pretrain.py --config=configs/quickstart.py --workdir=$(WORKDIR)

finetune: pretrain
	$(FINETUNE) --workdir=$(WORKDIR)_scratch
	$(FINETUNE) --workdir=$(WORKDIR)_finetuned --config.init.workdir=$(WORKDIR)
	@for run in scratch finetuned; do printf "%-10s" $$run; \
	  grep -o '"retrieval_mAP": [0-9.]*' $(WORKDIR)_$$run/metrics.jsonl | tail -n 1; done

# Two at once: most of a test is one thread of Python, or waits for a process.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-clients
	$(PYTEST)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-clients
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .venv312

# Pins differ by Python version, because the newest jax needs the newer Python.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv found;" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  -c constraints-py$$($(BIN)/python -c 'import sys; print(*sys.version_info[:2], sep="")').txt

$(VENV)/.installed: requirements.txt constraints-py311.txt constraints-py312.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-clients: requirements-clients.txt requirements-torch.txt requirements-beam.txt $(VENV)/.installed-test
	@$(INSTALL) -r requirements-clients.txt
	@# The TPU's compiler, for one test; among the others jax would look for a TPU.
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/libtpu libtpu==0.0.52
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	@$(INSTALL) -r requirements-test.txt
	@touch $@
