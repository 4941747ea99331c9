# make quickstart   text to a trained GPT on this machine      make test         the tests that need no GPU
# make check        style, types, architecture                 make test-slow    the slow ones too
# make docs         the pages as a site, in site/              make package      wheel and sdist, installed and run
# make notebook     docs/notebook.ipynb, executed anew

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart install test test-slow test-gpu test-browser test-network docs notebook package check format clean

quickstart: install
	@$(BIN)/regpt quickstart

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'regpt needs Python 3.11 or newer, this is ' + sys.version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing regpt and its packages into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $(STAMP)

test: install
	@$(BIN)/python -m pytest --numprocesses=auto

test-slow: install
	@$(BIN)/python -m pytest -m slow

test-gpu: install
	@$(BIN)/python -m pytest -m "gpu or multi_gpu"

test-browser: install
	@$(BIN)/python -m pytest -m browser

test-network: install
	@$(BIN)/python -m pytest -m network

docs: install
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

notebook: install
	@$(BIN)/jupyter execute --inplace docs/notebook.ipynb

# Both forms, built apart from this environment; the sdist is what the wheel is made from.
package: install
	@rm -rf dist .package
	@$(BIN)/python -m build --outdir dist . > .build.log || { cat .build.log; exit 1; }
	@$(PYTHON) -m venv .package
	@.package/$(notdir $(BIN))/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	@cd .package && $(notdir $(BIN))/regpt --version && $(notdir $(BIN))/regpt quickstart --steps 20 --out run
	@rm -rf .package

check: install
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/pyright --warnings > .pyright.log || { cat .pyright.log; exit 1; }
	@$(BIN)/python -m pytest tests/test_architecture.py

format: install
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .pyright.log .build.log .package dist site
