# The doors of the house: make env, make test, make check, make demo.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: env test check demo format golden

env: $(STAMP)

# torch alone and first: with it in place nothing asks the registry for another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(STAMP)

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: env
	$(BIN)/python examples/demo.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: env
	$(BIN)/python -m pytest -q tests/null/test_golden.py --update-golden
