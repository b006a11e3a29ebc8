# Everything runs in .venv, which `install` makes; nothing else has to be set up by hand.
.DEFAULT_GOAL := help
.PHONY: help install system check test slow demo monitoring clean

BIN := .venv/bin

# OpenMP threads that wait must sleep: spinning on a machine with few or shared cores makes small tensors 8 times slower.
export OMP_WAIT_POLICY ?= passive

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Put everything into .venv, at once when nothing changed; PYTHON=... names the interpreter to take
	@bash launch/install.sh $(PYTHON)

system: ## Install Debian packages that some tests use (root only; tests skip without them)
	@sh launch/system.sh

check: install ## Lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: install system check ## Check, then test everything but the slow tests; ARGS="-k store" goes to pytest
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: install ## The tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

demo: install ## A synthetic city, then CroCo on its video on two FSDP2 ranks
	bash launch/demo.sh

monitoring: system ## A Prometheus of your own on http://localhost:9090 over a run on this machine, with our rules
	@bash launch/monitoring.sh

clean: ## Remove what the targets made, .venv and the demo's run included
	rm -rf .venv demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
