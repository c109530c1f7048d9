# Everything a newcomer types. `make` alone lists it.

# Python 3.11 where there is one, else any newer python3; looked up only when .venv is to be made.
PYTHON = $(shell for found in python3.11 python3; do \
	$$found -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$found && break; done)
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= hospitals
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo sim federation test check slow format hooks wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## make .venv with all that any command here needs

demo: setup ## four hospitals fine-tune one model together: a whole federation, under 5 minutes
	@if [ -e runs/demo/config.yaml ]; then \
		echo "runs/demo is there: going on with it. Remove it to start anew."; \
		$(BIN)/silotune-sim run --resume runs/demo; \
	else \
		echo "Four hospitals fine-tune one model together; about 5 minutes, results in runs/demo"; \
		$(BIN)/silotune-sim run hospitals --out runs/demo; \
	fi

sim: setup ## run another configuration: make sim CONFIG=banks ARGS="federation.rounds=5"
	$(BIN)/silotune-sim run $(CONFIG) $(ARGS)

federation: setup ## the same on real processes: one coordinator and its institutions over TLS on this machine
	$(BIN)/silotune-sim federation $(CONFIG) $(ARGS)

test: check ## lint, types, and all tests but the slow ones
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

check: setup ## lint and types only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

slow: setup ## the slow tests: six whole federations and the guide's examples, half an hour
	$(BIN)/pytest -m slow

format: setup ## format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

hooks: setup ## check every commit before it is made
	$(BIN)/pre-commit install

wheel: setup ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove what tools left behind; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Touched last, so that an installation that was cut short is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "Silotune needs Python 3.11 or newer; none is on PATH. On Debian: apt install python3.11 python3.11-venv" >&2; \
			exit 1; \
		fi; \
		if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "$(PYTHON) cannot make virtual environments. On Debian: apt install $$($(PYTHON) -c \
				'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$($(PYTHON) --version) ..."; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing Silotune and what it needs into $(VENV): torch is large, this takes some minutes the first time ..."
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@
	@echo "Ready: $(BIN)/silotune-sim --help"
