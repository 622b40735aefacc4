# curvlib: one command sets up, runs and reports. `make help` lists the targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TIER ?= cpu
SEED ?= 0
BENCH ?= curvature
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
# The stamp is written last, so an interrupted set-up is redone; its name carries TORCH, so another build is installed afresh.
STAMP := $(VENV)/.ready-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce study test lint bench lab align release grade soak site

help: ## List the targets, one line of prose each.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo "Variables: TIER=$(TIER) SEED=$(SEED) PYTHON=$(PYTHON) TORCH=$(TORCH) BENCH=$(BENCH) WORKERS=$(WORKERS)"

setup: $(STAMP) ## Make the virtual environment in .venv and install curvlib with all it needs.

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "curvlib needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	$(RUN) -m pip install "$(TORCH)"
	$(RUN) -m pip install --editable ".[test]"
	@touch $@

reproduce: setup ## Run every notebook at TIER (ci, cpu or gpu) and SEED, and write runs/TIER/seedSEED/report.html.
	$(RUN) -m curvlib run --tier $(TIER) --seed $(SEED)

study: setup ## Run a study, notebooks/studies/*NAME*.ipynb, into runs/studies; PARAMS="-p rate 0.1" sets more.
	@test -n "$(NAME)" || { ls notebooks/studies; echo 'which study? make study NAME=...' >&2; exit 2; }
	$(RUN) -m curvlib run --studies --only "$(NAME)" --tier $(TIER) --seed $(SEED) $(PARAMS)

test: lint ## Check style and types, then run all tests and every notebook at tier ci, WORKERS at once, 5 GB each.
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

lint: setup ## Check style with ruff and types with mypy.
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: ## Run benchmarks/BENCH/run.py (curvature or influence) in .venv-bench and write its results beside it.
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet "$(TORCH)" --editable ".[test,$(if $(filter influence,$(BENCH)),bench-influence,bench)]"
	$(VENV)-bench/bin/python benchmarks/$(BENCH)/run.py

lab: setup ## Open the notebooks in JupyterLab.
	$(RUN) -m jupyterlab notebooks

align: setup ## Train the deep alignment anew from SEED and print where its adapter is and how it does on validation.
	$(RUN) -m curvlib align --seed $(SEED)

release: setup ## Write the student notebooks: notebooks/exercises (solutions folded), runs/release/exercises.zip (none).
	$(RUN) -m curvlib exercises release

grade: setup ## Grade FROM, a folder or zip of submissions, for the notebooks ONLY; see docs/teaching.md.
	$(RUN) -m curvlib exercises grade "$(FROM)" --only "$(ONLY)"

soak: setup ## Check every solution and every listed mistake of the exercises on 200 seeds.
	$(RUN) -m pytest tests/exercises/soak.py

site: setup ## Build the site, runs/site/docs/index.html: notebooks as committed, exercises, guides, with search.
	$(RUN) -m pip install --quiet --editable ".[site]"
	$(RUN) -m sphinx -q -W --keep-going -c docs . runs/site
