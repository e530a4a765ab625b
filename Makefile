# Two commands for a stranger: `make reproduce` and `make test`. Each does all its own set-up, in a virtual environment
# of its own (.venv). Variables: PYTHON, VENV, PROFILE, PIP_ARGS (for example a package index with CPU builds of torch), FAST
# (any value: only the tests that take seconds), JOBS (processes that share the tests).
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= laptop
PIP_ARGS ?=
FAST ?=
JOBS ?= 2
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS)

.PHONY: help reproduce test lint lab clean
help:
	@echo "make reproduce   set-up, then the whole book: figures/$(PROFILE)/index.html  (PROFILE=smoke for a quick look)"
	@echo "make test        set-up, then the test suite  (FAST=1 for the part that takes two minutes)"
	@echo "make lint        ruff over code and notebooks"
	@echo "make lab         JupyterLab in the notebooks folder"
	@echo "make clean       delete the environment (the store and the figures stay)"

# torch comes first and pinned: any other version would be fetched with gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

reproduce: $(VENV)/.installed
	$(VENV)/bin/ultramed run --profile $(PROFILE)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(if $(FAST),-m "not slow and not benchmark")

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lab: $(VENV)/.installed
	$(VENV)/bin/jupyter lab notebooks

clean:
	rm -rf $(VENV)
