# The two commands of a fresh clone are `make quickstart` and `make test`.
# Both make .venv with $(PYTHON) when it is missing; a stamp file per set of
# extras says what is installed, so that a second run takes seconds. Names are
# relative, so a path with spaces does no harm.

PYTHON ?= python3
WORKDIR ?= runs/quickstart
TEST_WORKERS ?= logical
KILLS ?= 50
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin/python
PARITY := $(VENV)/parity
PARITY_BIN := $(PARITY)/bin/python
TPU := $(VENV)/tpu
TPU_BIN := $(TPU)/bin/python
GPU := $(VENV)/gpu
GPU_BIN := $(GPU)/bin/python
PIP := "$(BIN)" -m pip --disable-pip-version-check
RUN := "$(BIN)" -m aquila_jax.cli.efficient_scale

.DEFAULT_GOAL := help
.PHONY: help quickstart smoke smollm2 smollm2-exact smollm2-trained \
  reproduce-scale-up reproduce-scale-out test test-long torture parity tpu gpu lint format typecheck clean

help:
	@echo "make quickstart   install, fetch the text, run EfficientScale, report"
	@echo "make smoke        the same in miniature, on text of the repository"
	@echo "make smollm2      fetch SmolLM2-135M, grow it, train on, export"
	@echo "make reproduce-scale-up   AquilaMoE's losses after growth, in small:" \
	  "hours"
	@echo "make reproduce-scale-out  what upcycling buys, in small: hours"
	@echo "make test         install and run the tests"
	@echo "make test-long    the long ones: all rows of the large tables"
	@echo "make torture      kill -9 a run KILLS=50 times: the bits of one never stopped"
	@echo "make parity       our models against those of transformers, with torch"
	@echo "make tpu          kernels through the TPU's compiler, which needs no TPU"
	@echo "make gpu          kernels through Triton's, which needs no GPU"
	@echo "make lint         ruff: format and rules     make typecheck  pyright"
	@echo "make format       ruff: rewrite              make clean      remove .venv"
	@echo "Variables: PYTHON=$(PYTHON) WORKDIR=$(WORKDIR)"

quickstart: $(VENV)/installed
	@$(RUN) --config=experiments/configs/quickstart.py --workdir="$(WORKDIR)"

smoke: $(VENV)/installed
	@$(RUN) --config=experiments/configs/smoke.py --workdir=runs/smoke

# What is there is not made again: each step's last file stands for it. The two
# jobs are independent of each other.
SMOLLM2 := runs/smollm2
SMOLLM2_CONFIG := experiments/configs/smollm2_efficient_scale.py
VERB := @"$(BIN)" -m aquila_jax.cli

smollm2:
	@$(MAKE) --no-print-directory smollm2-exact
	@$(MAKE) --no-print-directory smollm2-trained

# Twice the width by FPI, 8 experts, and the logits of the source in stock
# transformers. The tolerance is not parity's 2e-4: a vector of length 22,700 goes
# through SmolLM2's layers (docs/parity.md), and twice as wide its sums are added
# in another order.
smollm2-exact: $(SMOLLM2)/exact.json

# Grown and upcycled, trained on, evaluated, exported.
smollm2-trained: $(VENV)/installed $(SMOLLM2)/source/config.json
	$(VERB).efficient_scale --config=$(SMOLLM2_CONFIG) \
	  --workdir=$(SMOLLM2)/trained
	@test -e $(SMOLLM2)/trained_hf || "$(BIN)" -m aquila_jax.cli.export_hf \
	  --source=$(SMOLLM2)/trained/stages/scale_out/model \
	  --output=$(SMOLLM2)/trained_hf

$(SMOLLM2)/source/config.json: | $(VENV)/installed
	$(VERB).fetch_model smollm2_135m --output=$(@D)

$(SMOLLM2)/exact_up/config.json: | $(SMOLLM2)/source/config.json
	$(VERB).scale_up --source=$(SMOLLM2)/source --output=$(@D) \
	  --config=$(SMOLLM2_CONFIG) --stage=exact_up

$(SMOLLM2)/exact/config.json: | $(SMOLLM2)/exact_up/config.json
	$(VERB).scale_out --source=$(SMOLLM2)/exact_up --output=$(@D) \
	  --num_experts=8 --top_k=2

$(SMOLLM2)/exact_hf/config.json: | $(SMOLLM2)/exact/config.json
	$(VERB).export_hf --source=$(SMOLLM2)/exact --output=$(@D)

$(SMOLLM2)/exact.json: | $(PARITY)/installed $(SMOLLM2)/exact_hf/config.json
	@"$(PARITY_BIN)" -m aquila_jax.cli.compare_hf --model=$(SMOLLM2)/source \
	  --reference=$(SMOLLM2)/exact_hf --continue_tokens=8 --tolerance=5e-4 --output=$@

# Stopped and started again, it goes on; the page holds what is done so far.
reproduce-scale-up: $(VENV)/installed
	@"$(BIN)" -m benchmarks.reproduce_scale_up \
	  --workdir=runs/reproduce_scale_up \
	  --output=benchmarks/results/reproduce_scale_up.json \
	  --page=docs/reproduce_scale_up.md

reproduce-scale-out: $(VENV)/installed
	@"$(BIN)" -m benchmarks.reproduce_scale_out \
	  --workdir=runs/reproduce_scale_out \
	  --output=benchmarks/results/reproduce_scale_out.json \
	  --page=docs/reproduce_scale_out.md

# The rest of the tables, and whole runs that are killed, are test-long's: what
# `pytest.mark.long` and `mostly_long` say.
test: TESTS := not long
test-long: TESTS := long
test test-long: $(VENV)/installed-test
	@"$(BIN)" -m pytest -q -n "$(TEST_WORKERS)" --maxprocesses 8 \
	  --dist worksteal -m "$(TESTS)" $(PYTEST_FLAGS)

# Not part of the tests: half an hour on 2 idle cores.
torture: $(VENV)/installed-test
	@"$(BIN)" -m tests.torture --kills="$(KILLS)"

# In an environment of its own: what tests run on has no torch. One thread a
# process, because torch waits for its threads by spinning. Where pip's index has
# no CPU build of torch, PIP_EXTRA_INDEX_URL can name one that has.
parity: $(PARITY)/installed
	@rm -f "$(PARITY)/records.jsonl"
	@JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 "$(PARITY_BIN)" -m pytest -q \
	  -n "$(TEST_WORKERS)" --maxprocesses 8 --dist worksteal \
	  --confcutdir=tests/parity -o python_files='*_parity.py' \
	  -o filterwarnings=default --records="$(PARITY)/records.jsonl" \
	  $(PYTEST_FLAGS) tests/parity
	@"$(PARITY_BIN)" -m tests.parity.page "$(PARITY)/records.jsonl"

# In an environment of its own, with libtpu: its compiler runs on any machine.
tpu: $(TPU)/installed
	@JAX_PLATFORMS=cpu "$(TPU_BIN)" -m pytest -q --confcutdir=tests/tpu \
	  -o python_files='*_tpu.py' $(PYTEST_FLAGS) tests/tpu

# In an environment of its own, with triton: so does a GPU's.
gpu: $(GPU)/installed
	@JAX_PLATFORMS=cpu "$(GPU_BIN)" -m pytest -q --confcutdir=tests/gpu \
	  -n "$(TEST_WORKERS)" --maxprocesses 8 --dist worksteal \
	  -o python_files='*_gpu.py' $(PYTEST_FLAGS) tests/gpu

lint: $(VENV)/installed-dev
	@"$(BIN)" -m ruff format --check .
	@"$(BIN)" -m ruff check .

format: $(VENV)/installed-dev
	@"$(BIN)" -m ruff check --fix .
	@"$(BIN)" -m ruff format .

typecheck: $(VENV)/installed-dev $(VENV)/installed-test
	@"$(BIN)" -m pyright --pythonpath "$(BIN)"

clean:
	rm -rf "$(VENV)"

$(VENV)/created:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "aquila_jax: there is no '$(PYTHON)'; name Python 3.11 or later," \
	    "as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "aquila_jax: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); it needs Python" \
	    "3.11 or later, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch "$@"

$(VENV)/installed: $(VENV)/created setup.py pyproject.toml
	@echo "Installing aquila_jax into $(VENV) (a minute or two) ..."
	@$(PIP) install --quiet --editable .
	@touch "$@"

$(VENV)/installed-test: $(VENV)/created setup.py pyproject.toml
	@echo "Installing aquila_jax[test] into $(VENV) (a minute or two) ..."
	@$(PIP) install --quiet --editable ".[test]"
	@touch "$@" "$(VENV)/installed"

# An environment of its own, beside the one that tests run in.
define INSTALL_APART
	@echo "Installing aquila_jax[$(EXTRA)] into $(@D) ($(TAKES)) ..."
	@"$(PYTHON)" -m venv "$(@D)"
	@"$(@D)/bin/python" -m pip --disable-pip-version-check install --quiet \
	  --editable ".[$(EXTRA),test]"
	@touch "$@"
endef

$(PARITY)/installed: EXTRA := parity
$(PARITY)/installed: TAKES := torch: minutes
$(PARITY)/installed: $(VENV)/created setup.py
	$(INSTALL_APART)

$(TPU)/installed: EXTRA := tpu
$(TPU)/installed: TAKES := libtpu: a minute
$(TPU)/installed: $(VENV)/created setup.py
	$(INSTALL_APART)

$(GPU)/installed: EXTRA := triton
$(GPU)/installed: TAKES := triton: a minute
$(GPU)/installed: $(VENV)/created setup.py
	$(INSTALL_APART)

$(VENV)/installed-dev: $(VENV)/installed-test
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP) install --quiet --editable ".[dev]"
	@touch "$@"
