# `make demo` and `make test` need Python 3.11+ and a C compiler; each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench compile ptx docs clean

demo: .venv/.installed
	$(BIN)/ponder demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.installed-dev
	$(BIN)/python -m ponder.benchmarks

# Every kernel configuration, compiled for each chip by each Triton that is supported.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
CHIPS ?= 80 90 100 120 gfx942
compile: $(TRITONS:%=.venv/triton-%)
	for version in $(TRITONS); do echo "Triton $$version"; PYTHONPATH=.venv/triton-$$version \
	  PONDER_COMPILE=all CHIPS="$(CHIPS)" $(BIN)/python -m pytest -q -n auto tests/kernels/test_compile.py || exit 1; done

# Every test of the kernels, on what Triton compiles for these chips (tests/ptx): an hour for each.
ptx: .venv/.installed-dev
	for chip in 80 90 100 120; do PONDER_PTX=$$chip $(BIN)/python -m pytest -q -n auto tests/kernels \
	  || exit 1; done

.venv/triton-%: | .venv/.installed-dev
	$(BIN)/python -m pip install -q --no-deps --target $@ triton==$*

# The tour, run and drawn, and the reference from the docstrings: site/index.html.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict

clean:
	rm -rf .venv site build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# pip compiles one file after another; compileall takes every core. What does not compile is for
# another Python, and never imported.
INSTALL = $(BIN)/python -m pip install -q --no-compile -c constraints.txt -e
COMPILE = $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) ".[train,inference,report]"
	$(COMPILE)
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) ".[dev]"
	$(COMPILE)
	touch $@ .venv/.installed

.venv/.installed-docs: pyproject.toml constraints.txt | .venv/.installed
	$(INSTALL) ".[docs]"
	$(COMPILE)
	touch $@
