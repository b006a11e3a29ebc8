# Everything runs in .venv, which `install` makes; nothing else has to be set up by hand.
.DEFAULT_GOAL := help
.PHONY: help install system check test slow demo clean

PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Put everything into .venv; takes no time when nothing changed

$(STAMP): pyproject.toml constraints.txt launch/install.sh
	@bash launch/install.sh "$(PYTHON)" "$(VENV)"
	@touch $@

system: ## Install Debian packages that some tests use (root only; tests skip without them)
	@bash launch/system.sh

check: install ## Lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install system check ## Check and test everything that takes less than minutes
	$(BIN)/python -m pytest

slow: install ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

demo: install ## A synthetic city, then CroCo on its video on two FSDP2 ranks
	bash launch/demo.sh

clean: ## Remove what the targets made, .venv included
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
