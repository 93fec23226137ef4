# `make` says what there is; PYTHON=python3.12 make ... takes another interpreter.
PYTHON ?= python3
BIN := .venv/bin/python
PIP := $(BIN) -m pip install --quiet -c constraints.txt
# A process runs the tests of a file one after the other, and sets up once what they share.
AT_ONCE := -n 2 --dist worksteal

.PHONY: help demo test test-slow test-browser test-ray test-nightly docs docs-serve picture lint clean
help:
	@echo 'make demo       install into .venv, train a CNN on MNIST, leave a W&B run and a page of what Adam did'
	@echo 'make test       install into .venv, run the tests (some minutes)'
	@echo 'make test-slow  the tests in fresh environments and with longer trainings'
	@echo 'make test-browser  the report in Chromium, which has to be there'
	@echo 'make test-ray   searches through Ray, which is started on this machine'
	@echo 'make test-nightly  the longest tests, run by hand before a release'
	@echo 'make docs       the site of the documentation, into site'
	@echo 'make docs-serve the same at http://127.0.0.1:8000, built anew when a page changes'
	@echo 'make picture    the picture of the newest report in the README'
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

test: .venv/dev-installed
	$(BIN) -m pytest $(AT_ONCE) -m 'not slow and not nightly and not browser and not ray'

test-slow: .venv/dev-installed
	$(BIN) -m pytest $(AT_ONCE) -m 'slow and not browser and not ray'

test-browser: .venv/dev-installed
	$(BIN) -m pytest $(AT_ONCE) -m browser tests/e2e

test-nightly: .venv/dev-installed
	$(BIN) -m pytest $(AT_ONCE) -m nightly

# One after the other: each starts a Ray of its own, for two processors.
test-ray: .venv/dev-installed
	$(BIN) -m pytest -m ray tests/e2e

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
