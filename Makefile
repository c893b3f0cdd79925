# make train    the main job: train, sample and evaluate on the handwritten digits
# make test     the tests
# Both first make .venv and install into it what they need, once; again only when the requirements change.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PIP_ARGS ?=

BIN          := $(VENV)/bin
PIP_INSTALL   = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.PHONY: help train test lint wheel clean

help:
	@echo 'make train   install into $(VENV), then train on the digits, draw samples, evaluate the likelihood'
	@echo 'make test    install into $(VENV), then run all tests (about ten minutes on two cores)'
	@echo 'make lint    style and types'
	@echo 'make wheel   build the source archive and the wheel into dist/'
	@echo 'make clean   remove $(VENV), caches and builds; leaves runs/ alone'
	@echo
	@echo 'ARGS adds flags:         make train ARGS="--workdir runs/mine --config.training.steps=100"'
	@echo '                         make test ARGS="-m '"'not slow'"'"'
	@echo 'PYTHON names the Python: make train PYTHON=python3.12'
	@echo 'PIP_ARGS adds to every "pip install", for example another package index'

train: $(VENV)/.core
	$(BIN)/python -m sde_diffusion.run --mode train $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sde_diffusion

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an environment, the package in it, and everything for working on the package.
$(VENV)/.made:
	@command -v '$(PYTHON)' >/dev/null 2>&1 || { \
	  echo 'There is no "$(PYTHON)" here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'This needs Python 3.10 or newer, but $(PYTHON) is' "$$('$(PYTHON)' --version 2>&1)." \
	       'Name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments: its venv module is missing.' \
	       'On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	'$(PYTHON)' -m venv --clear $(VENV)
	@touch $@

$(VENV)/.core: $(REQUIREMENTS) | $(VENV)/.made
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) | $(VENV)/.made
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.core
