# `make demo` and `make test` do all set-up themselves, in .venv, and only once.

PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
WORKERS ?= 2
READY := .venv/.ready
TOOLS := .venv/.ready-tools

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help demo test test-oldest lint docs format bench clean

help:
	@echo "make demo    a real model answers questions about a long document: cold, warm, and in a new process"
	@echo "make test    lint, type check and tests in two processes (WORKERS=N), some with the oldest transformers"
	@echo "make test-oldest  more tests with that one; VERSION=5.21.0 for another"
	@echo "make lint    ruff and pyright only"
	@echo "make docs    the documentation site, in site/; a warning is an error"
	@echo "make format  format the sources"
	@echo "make bench   cold against warm on this machine"
	@echo "make clean   remove .venv and caches of tools (not the models in .cache)"

$(READY): pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	@touch $@

# The tests also run other people's programs with kvembed inside: about 0.9 GB of packages.
$(TOOLS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[chat,gguf,dev,docs,clients,lm-eval]'
	@touch $@

demo: $(READY)
	$(BIN)/kvembed demo $(ARGS)

# Two processes of one thread each: threads of several processes that wait for each other on two cores spin, and cost
# more than they bring. Some tests with real models take all cores nevertheless. WORKERS=0 is one process.
# Ends with the oldest transformers, unless only some tests are asked for.
test: lint docs
	$(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	$(if $(ARGS),,env -u VERSION BIN=$(BIN) .ci/versions quick)

test-oldest: $(TOOLS)
	BIN=$(BIN) .ci/versions

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(TOOLS)
	$(BIN)/python tools/build_docs.py

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/kvembed bench $(ARGS)

clean:
	rm -rf .venv site .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.cache/*' -prune -exec rm -rf {} +
