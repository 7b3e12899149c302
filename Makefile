# The two commands to know: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DIST   := dist
# pytest-benchmark's own table: short, and by row.
RACES  := --benchmark-columns=median,iqr,rounds --benchmark-group-by=group -p no:cacheprovider
QUICK  := "test_row and (fp32 or bf16-dropout or layer-256-1024 or inference or routed-1- or wrap or save-1400 or merge)"

# Nothing here asks a model hub for anything.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all lint format bench bench-quick dist install clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install ## Fine-tune a real model three ways and compare them (some minutes; downloads 86 MB once)
	$(BIN)/python benchmarks/demo.py

test: lint install ## Lint, build the wheels, install them, and run the tests against what is installed
	$(BIN)/pytest -n auto

test-all: lint install ## The same, with the slow tests
	$(BIN)/pytest -n auto -m "slow or not slow"

lint: $(VENV)/.dependencies ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dependencies ## Rewrite the code in the house format
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .

bench: install ## Race peftkit and its peers (15 minutes on two cores; ARGS="--device cuda" on a GPU)
	$(BIN)/pytest benchmarks $(RACES) $(ARGS)

bench-quick: install ## The same in two minutes: few rounds of some rows, into dist/races.json
	$(BIN)/pytest benchmarks $(RACES) --rounds 4 --report $(DIST)/races.json -k $(QUICK) $(ARGS)

dist: $(VENV)/.builder ## Build the wheels, peftkit's and its plugins', into dist/
	rm -f $(DIST)/peftkit*.whl
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) . ./plugins/*/

# The wheels are installed anew each time, and nothing else is: the tests see what a user would get.
install: dist $(VENV)/.dependencies
	$(PIP) install --quiet --no-deps --no-index --force-reinstall $(DIST)/peftkit*.whl

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(DIST) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Three stamps, so that a second run installs nothing but the wheel: the environment, what builds the wheel, and
# what tests it. pip reads the extras from the wheel, so a change in pyproject.toml's dependencies is picked up.

$(VENV)/.created:
	@$(PYTHON) -c 'pass' || { echo "peftkit needs Python 3.11 or newer, and '$(PYTHON)' does not run. Install one, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "peftkit needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())'). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.builder: constraints.txt | $(VENV)/.created
	$(PIP) install --quiet -c constraints.txt hatchling
	@touch $@

$(VENV)/.dependencies: pyproject.toml constraints.txt | $(VENV)/.builder
	@$(MAKE) --no-print-directory dist
	$(PIP) install -c constraints.txt "$$(ls $(DIST)/peftkit-*.whl)[dev]"
	@$(PIP) install -c constraints.txt "$$(ls $(DIST)/peftkit-*.whl)[consumers]" || echo "mlx or llama.cpp has no wheel for this system: their tests will be skipped"
	@touch $@
