# Two commands matter: `make book` and `make test`. Every target makes .venv by itself.
PYTHON := .venv/bin/python
PRESET ?= small
UV := .venv/bin/uv

.PHONY: book test test-colab check-links bench execute lint lock data repository clean
.DEFAULT_GOAL := book

.venv/.installed: requirements.txt pyproject.toml
	@echo "Installing into .venv (a few minutes the first time; nothing to do after that) ..."
	@test -x $(UV) || { python3 -m venv .venv && .venv/bin/python -m pip install --quiet --disable-pip-version-check uv; }
	@# Compiled at once, by all cores: else Python does it at the first import, and at each one where it may not write.
	@$(UV) pip sync --quiet --compile-bytecode --python $(PYTHON) requirements.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

book: .venv/.installed  ## build the book; PRESET=full executes the chapters on the EPFL stacks first
	@$(PYTHON) tools/book.py --preset $(PRESET)

test: lint book  ## everything: lint, the book, unit tests, chapters (outputs compared), browser tests
	@echo "Running the tests ..."
	@$(PYTHON) -m pytest --nbval

test-colab: .venv/.installed  ## run all chapters as in Colab, in a fresh environment
	@$(PYTHON) -m pytest tests/test_colab_emulation.py --all-in-colab

check-links: .venv/.installed  ## ask every address of others that the course names; needs a network
	@$(PYTHON) tools/links.py --check

bench: .venv/.installed  ## speed, as ratios within one run
	@$(PYTHON) tools/bench.py

execute: .venv/.installed  ## run the chapters in place (small preset) and store their outputs
	@$(PYTHON) tools/execute.py

lint: .venv/.installed
	@echo "Checking the style with ruff ..."
	@.venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check . \
		|| { echo "ruff found something: 'ruff check --fix . && ruff format .' mends most of it"; exit 1; }

lock: .venv/.installed  ## compile requirements.txt anew from pyproject.toml, without any address
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --no-emit-index-url --no-header \
		--extra onnx --extra book --extra test pyproject.toml --output-file requirements.txt

data: .venv/.installed  ## make the bundled phantom stacks again (equal pixels)
	@$(PYTHON) -m mitoseg_lib.phantom data

repository: .venv/.installed  ## make repository URL=https://... : the public address, in every badge and set-up cell
	@$(PYTHON) tools/repository.py "$(URL)"

clean:
	rm -rf _build .venv .pytest_cache .ruff_cache .hypothesis
