# make run    train SimDiffRec on ml-100k for 40 epochs, print metrics and recommendations
# make test   lint and the default test suite
# Needs Python 3.11 or later, make, and a package index.

PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV ?= .venv
DATA_PATH ?= dataset
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# From Python 3.12 on pip cannot resolve recbole 1.2.1, whose pinned ray has no build there. Nothing
# here needs ray, and everything else that RecBole imports is a dependency of this package.
RECBOLE := --no-deps -c constraints.txt recbole

.PHONY: run test test-slow test-no-ray lint bench docs release-check clean

run: $(VENV)/.installed
	$(BIN)/python run_recbole_simdiff.py --model=SimDiffRec --dataset=ml-100k --epochs=40 --show_users=3

test: lint
	$(BIN)/python -m pytest -q -n auto

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

# The stack of Python 3.12 and later, on any Python: RecBole without ray.
test-no-ray:
	$(MAKE) test VENV=.venv-no-ray NO_RAY=1

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks --data_path=$(DATA_PATH)

# The site, in build/site; open build/site/index.html. A broken link or anchor is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and sdist in a fresh environment of each Python that is there.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
release-check: $(VENV)/.installed
	$(BIN)/python -m tests.release_check $(PYTHONS)

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(RECBOLE)
	$(PIP) -c constraints.txt -e '.[test]'
	@if [ -n "$(NO_RAY)" ]; then $(BIN)/python -m pip uninstall --quiet --yes ray; fi
	@touch $@

clean:
	rm -rf .venv .venv-no-ray build dist log_tensorboard .pytest_cache .mypy_cache .ruff_cache
