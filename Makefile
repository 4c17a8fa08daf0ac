# `make demo` trains the demo from nothing; `make test` runs the tests, `make lint` ruff and pyright. They make their own .venv.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/coca_emoji
DATA ?= data/emoji
BIN := $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/vlp data emoji --out $(DATA)
	$(BIN)/vlp train --config configs/coca_emoji.py:path=$(DATA) --workdir $(WORKDIR)
	$(BIN)/vlp report $(WORKDIR)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n logical --dist worksteal --durations=12

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"make: got Python {v.major}.{v.minor}, expected 3.11 or newer; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[demo]'
	touch $@

$(VENV)/.dev: setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[dev]' $(WITH)
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info
