# make report   set up, run the experiment in params.yaml, print the headline of its report
# make test     set up, check format, style, types and imports, run the tests but campaigns
# make test-all the same with campaigns: long series of random cases
# make setup    only install what is needed, into .venv

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

# An environment holds absolute paths: after a move or a copy of this directory it is of no use.
OWN := import os, pocketlm; os.path.samefile(pocketlm.__path__[0], "pocketlm") or exit(1)
ifneq ($(wildcard .venv),)
$(INSTALLED): $(shell $(BIN)/python -I -c '$(OWN)' 2>/dev/null || echo unusable)
endif

# As many workers as cores, each with whole files of tests; whole-workflow tests begin. Campaigns get one
# worker more, as those on a cluster wait more than they compute.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count()))')
PYTEST := $(BIN)/pytest --dist loadgroup --no-loadscope-reorder --numprocesses

.PHONY: report test test-all campaigns checks setup unusable
.DEFAULT_GOAL := report

report: $(INSTALLED)
	@[ -e params.yaml ] || $(BIN)/pocketlm preset demo
	@$(BIN)/snakemake --cores all report
	@cat artifacts/report/headline.txt

test: checks
	$(PYTEST) $(WORKERS) -m "not campaign"

test-all: test campaigns

campaigns: $(INSTALLED)
	$(PYTEST) $$(($(WORKERS) + 1)) -rs -m campaign

checks: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(INSTALLED)

unusable:
	@echo "making .venv again: it lacks its Python, is incomplete, or was made in another directory"
	@rm -rf .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d, but 3.11 or newer is needed\n  repair: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pocketlm.workflow.plots_page
	@touch $@
