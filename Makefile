# `make demo` and `make test` do all of their own set-up: they need Python 3.11 or newer, make and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := .cache/smollm2
GGUF := .cache/smollm2.gguf
INSTALL := python -m pip install --quiet --disable-pip-version-check
EVERYTHING := .[transformers,diffusers,dev]
QUESTION := What is the capital of France?

.PHONY: help demo test test-fast test-lowest test-latest soak check bench docs lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"multicard needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --constraint requirements.lock pip setuptools
	$(BIN)/$(INSTALL) --constraint requirements.lock --no-build-isolation --editable '$(EVERYTHING)'
	touch $@

$(MODEL)/config.json: | $(READY)
	$(BIN)/python examples/smollm2.py $(MODEL)

$(GGUF): | $(READY)
	$(BIN)/python examples/smollm2.py $(GGUF)

demo: $(READY) $(GGUF)  ## a real model answers a question, and a picture is drawn, each on two ranks
	$(BIN)/multicard generate --model $(GGUF) --tp 2 "$(QUESTION)" --max-new-tokens 32
	$(BIN)/python examples/digits/sample.py --cfg 2 --output out/digits.png

test: $(READY) $(MODEL)/config.json $(GGUF)  ## all tests but the soak
	$(BIN)/python -m pytest -m "not soak"

test-fast: $(READY)  ## a developer's loop: the tests that start no processes of their own and compile nothing
	$(BIN)/python -m pytest -m "not soak and not slow"

test-lowest: $(MODEL)/config.json  ## the tests of seams into other libraries, with the lowest versions of pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tools/requirements.py lowest > .venv-lowest/constraints.txt
	.venv-lowest/bin/$(INSTALL) --constraint .venv-lowest/constraints.txt --editable '$(EVERYTHING)'
	.venv-lowest/bin/python -m pytest -m "seam and not soak"

test-latest: $(MODEL)/config.json  ## the same, with the newest versions that there are today
	$(PYTHON) -m venv .venv-latest
	$(PYTHON) tools/requirements.py latest > .venv-latest/constraints.txt
	.venv-latest/bin/$(INSTALL) --upgrade pip
	.venv-latest/bin/$(INSTALL) --upgrade --upgrade-strategy eager --constraint .venv-latest/constraints.txt --editable '$(EVERYTHING)'
	.venv-latest/bin/python -m pytest -m "seam and not soak"

soak: $(READY) $(MODEL)/config.json $(GGUF)  ## the long counts: faults, stress, long contexts
	$(BIN)/python -m pytest -m soak

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) $(MODEL)/config.json  ## every benchmark, one after the other, on a machine that does nothing else
	for script in benchmarks/[a-z]*.py; do [ $$script = benchmarks/common.py ] || $(BIN)/python $$script || exit 1; done

docs: $(READY)  ## write the generated tables in docs/ again
	$(BIN)/python tests/attention/features.py
	$(BIN)/python tests/transformers_table.py
	$(BIN)/python tests/versions_table.py
	UPDATE_DOCS=1 $(BIN)/python -m pytest tests/integrations/diffusers/test_models.py tests/integrations/diffusers/test_rows_of_models.py

lock:  ## write requirements.lock again: the newest versions that go together
	$(PYTHON) tools/requirements.py lock

clean:  ## remove what these commands made
	rm -rf $(VENV) .venv-lowest .venv-latest .cache out build .pytest_cache .hypothesis .ruff_cache .mypy_cache
