# `make` lists the targets. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin/python
# With worksteal, one process runs the tests of a file in order and sets up once what they share.
PYTEST := $(BIN) -m pytest -n 2 --dist worksteal
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs

.PHONY: help demo test test-ci test-nightly docs docs-serve picture lint release-check clean
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing into .venv (torch is large: some minutes the first time)'
	$(BIN) -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

demo: .venv/recipes-installed ## install, train a CNN on MNIST, write a W&B run and its report
	$(BIN) -m recipes.mnist

# pyproject.toml defines which tests each tier selects.
test: .venv/dev-installed ## install, run the default tests (two to three minutes)
	@echo 'collecting tests; the first results take about 20 seconds'
	$(PYTEST)

test-ci: .venv/dev-installed ## run the default and the slow tests (processes, Chromium, a fresh environment)
	@echo 'collecting tests; the first results take about 20 seconds'
	$(PYTEST) -m 'not nightly'

test-nightly: .venv/dev-installed ## run the longest tests, before a release
	$(PYTEST) -m nightly

docs: .venv/dev-installed ## build the documentation into site/
	$(MKDOCS) build --strict

docs-serve: .venv/dev-installed ## serve the documentation at http://127.0.0.1:8000, rebuild it on changes
	$(MKDOCS) serve

picture: .venv/dev-installed ## take the screenshot of the newest report for the documentation
	$(BIN) .ci/picture.py $(lastword $(sort $(wildcard outputs/*/*/report.html)))

lint: .venv/dev-installed ## run ruff (lint and format), the word list and mypy
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) .ci/words.py
	$(BIN) -m mypy

release-check: .venv/dev-installed ## build the wheel and the sdist, check, install and run them
	$(BIN) -m pytest -m '' -k 'not editable' tests/e2e/test_installed.py

clean: ## remove .venv, caches, builds and the outputs of runs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist outputs multirun site
