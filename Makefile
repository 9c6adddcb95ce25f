# The two commands of a fresh clone are `make quickstart` and `make test`.
# Both make .venv with $(PYTHON) when it is missing; a stamp file per set of
# extras says what is installed, so that a second run takes seconds. Names are
# relative, so a path with spaces does no harm.

PYTHON ?= python3
WORKDIR ?= runs/quickstart
TEST_WORKERS ?= logical
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin/python
PARITY := $(VENV)/parity
PARITY_BIN := $(PARITY)/bin/python
PIP := "$(BIN)" -m pip --disable-pip-version-check
RUN := "$(BIN)" -m aquila_jax.cli.efficient_scale

.DEFAULT_GOAL := help
.PHONY: help quickstart smoke test parity lint format typecheck clean

help:
	@echo "make quickstart   install, fetch the text, run EfficientScale, report"
	@echo "make smoke        the same in miniature, on text of the repository"
	@echo "make test         install and run every test"
	@echo "make parity       our models against those of transformers, with torch"
	@echo "make lint         ruff: format and rules     make typecheck  pyright"
	@echo "make format       ruff: rewrite              make clean      remove .venv"
	@echo "Variables: PYTHON=$(PYTHON) WORKDIR=$(WORKDIR)"

quickstart: $(VENV)/installed
	@$(RUN) --config=experiments/configs/quickstart.py --workdir="$(WORKDIR)"

smoke: $(VENV)/installed
	@$(RUN) --config=experiments/configs/smoke.py --workdir=runs/smoke

test: $(VENV)/installed-test
	@"$(BIN)" -m pytest -q -n "$(TEST_WORKERS)" --maxprocesses 8 \
	  --dist worksteal $(PYTEST_FLAGS)

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

$(PARITY)/installed: $(VENV)/created setup.py
	@echo "Installing aquila_jax[parity] into $(PARITY) (torch: minutes) ..."
	@"$(PYTHON)" -m venv "$(PARITY)"
	@"$(PARITY_BIN)" -m pip --disable-pip-version-check install --quiet \
	  --editable ".[parity,test]"
	@touch "$@"

$(VENV)/installed-dev: $(VENV)/installed-test
	@echo "Installing the development tools into $(VENV) ..."
	@$(PIP) install --quiet --editable ".[dev]"
	@touch "$@"
