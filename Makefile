# `make demo` sets up and runs the demonstration; `make check` sets up and runs every check.

PYTHON ?= python3
VENV ?= .venv

.PHONY: help demo check lint types test clean

help:  ## list what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

demo: $(VENV)/demo  ## record a small training run and find its wrong labels
	$(VENV)/bin/metaql demo

check: lint types test  ## what CI runs

lint: $(VENV)/test  ## ruff, and its formatter
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/test  ## mypy, strict
	$(VENV)/bin/mypy

test: $(VENV)/test  ## pytest
	$(VENV)/bin/pytest

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
