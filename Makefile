# Two commands do everything: `make demo` renders a film, `make test` runs the checks.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))) python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
# Two pytest processes, one compute thread each: the checks are sized for two cores. A file is one process's, so that its
# fixtures (films, clusters) are made once, and the longest files come first (tests/conftest.py).
export OMP_NUM_THREADS ?= 1

.PHONY: setup dev demo media test lint types unit chaos five-minutes clean help

help:
	@echo "make demo          set up and render examples/demo.yaml with the bundled checkpoint"
	@echo "make media         draw the pictures and sounds that the examples start from"
	@echo "make test          set up and run the checks: ruff, mypy, architecture, tests (but those of make chaos)"
	@echo "make chaos         clusters on this machine whose nodes and processes are taken away"
	@echo "make five-minutes  render examples/five_minutes.yaml and measure time and memory"
	@echo "make clean         remove the virtual environment and what was rendered here"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || { echo "$(PYTHON) is missing or another version: install Python 3.11 or 3.12 with venv, or name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed

dev: $(VENV)/.installed-dev

media: setup
	$(BIN)/python examples/make_media.py

demo: media
	$(BIN)/longtake render examples/demo.yaml

five-minutes: setup
	$(BIN)/python examples/measure.py examples/five_minutes.yaml

lint: dev
	$(BIN)/ruff check .

# Twice at the same time: as for this system, and as for macOS, whose `os`, `fcntl` and `signal` have other names in them.
types: dev
	@$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin & $(BIN)/mypy; code=$$?; wait $$! && exit $$code

unit: dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/chaos

# Clusters of several raylets, whose machines come and go. Tests are handed out one by one (loadgroup without groups): each
# process has a cluster for all of its tests. What measures time or memory, or takes jobs, has the machine to itself.
chaos: dev
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not alone" tests/chaos
	$(BIN)/python -m pytest -q -m alone tests/chaos

test: lint types unit

clean:
	rm -rf $(VENV) renders runs examples/media demo.mp4 five-minutes.mp4
