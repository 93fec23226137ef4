# `make` says what there is; PYTHON=python3.12 make ... takes another interpreter.
PYTHON ?= python3
BIN := .venv/bin/python
PIP := $(BIN) -m pip install --quiet -c constraints.txt
# A process runs the tests of a file one after the other, and sets up once what they share.
AT_ONCE := -n 2 --dist worksteal

.PHONY: help demo test test-ci test-nightly docs docs-serve picture lint clean
help:
	@echo 'make demo       install into .venv, train a CNN on MNIST, write a W&B run and its report'
	@echo 'make test       install into .venv, run the default tests (two to three minutes)'
	@echo 'make test-ci    these, and those that need processes, Chromium or a fresh environment'
	@echo 'make test-nightly  the longest tests, run by hand before a release'
	@echo 'make docs       the site of the documentation, into site'
	@echo 'make docs-serve the same at http://127.0.0.1:8000, built anew when a page changes'
	@echo 'make picture    the picture of the newest report, for the documentation'
	@echo 'make lint       ruff (lint and format) and mypy'
	@echo 'make clean      remove .venv, caches and the outputs of jobs'

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/recipes-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv (torch is large: some minutes the first time)'
	$(PIP) -e '.[recipes]'
	@touch $@

.venv/dev-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv (torch is large: some minutes the first time)'
	$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/recipes-installed
	$(BIN) -m recipes.mnist

# pyproject.toml says which tests each of these selects.
test: .venv/dev-installed
	@echo 'collecting tests; the first results take about 20 seconds'
	$(BIN) -m pytest $(AT_ONCE)

test-ci: .venv/dev-installed
	@echo 'collecting tests; the first results take about 20 seconds'
	$(BIN) -m pytest $(AT_ONCE) -m 'not nightly'

test-nightly: .venv/dev-installed
	$(BIN) -m pytest $(AT_ONCE) -m nightly

docs: .venv/dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --strict

docs-serve: .venv/dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs serve

picture: .venv/dev-installed
	$(BIN) .ci/picture.py $(lastword $(sort $(wildcard outputs/*/*/report.html)))

lint: .venv/dev-installed
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist outputs multirun site
