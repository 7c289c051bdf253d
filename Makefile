# One command each; `make` alone lists them. Everything installs into .venv, from exact pins.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PYTHON

# Passed to pip for torch only: say, the options that name an index of builds without CUDA.
TORCH_PIP_ARGS ?=
# Passed on by `make demo`, `make pytest`, `make fuzz` and `make bench`, e.g. ARGS=--quick.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint pytest fuzz format bench lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## install, then swap three models through a small memory
	@$(BIN)/hotswap demo $(ARGS)

test: lint pytest ## install, then every check and test: what CI runs

lint: $(VENV)/.installed-dev ## format, lint, strict types, import rules, bus document
	@echo "==> ruff format"
	@$(BIN)/ruff format --check .
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> import rules"
	@$(BIN)/lint-imports --no-logo
	@echo "==> docs/asyncapi.json"
	@$(BIN)/python -m schemas.asyncapi --check docs/asyncapi.json

pytest: $(VENV)/.installed-dev ## the tests alone; ARGS='-k swap' picks some
	@echo "==> pytest"
	@$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.installed-dev ## thousands of generated requests against the OpenAPI document
	@$(BIN)/python -m tests.conformance.fuzz $(ARGS)

format: $(VENV)/.installed-dev ## rewrite files in the agreed format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/python -m schemas.asyncapi docs/asyncapi.json

bench: $(VENV)/.installed-dev ## run all benchmarks; ARGS=--quick for under a minute each
	@$(BIN)/python -m bench $(ARGS)

lock: $(VENV)/.installed-dev ## pin the versions that are installed now
	@$(BIN)/python requirements/lock.py

clean: ## remove .venv, caches and build outputs (not .hotswap, the demo models)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python="$$(requirements/find-python.sh)" || exit 1; \
	echo "==> making $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)

# pip -qq: errors only, the lines in between say what goes on.
# The stamps make a second run quick: they are older than a file only when that file changed.
$(VENV)/.installed: requirements/torch.txt requirements/runtime.txt pyproject.toml | $(BIN)/python
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@echo "==> installing torch (the first time this takes a few minutes)"
	@$(PIP) install -qq -r requirements/torch.txt -c requirements/runtime.txt $(TORCH_PIP_ARGS)
	@echo "==> installing the other packages"
	@$(PIP) install -qq -r requirements/runtime.txt
	@echo "==> installing hotswap itself"
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	@echo "==> installing what the checks and tests need"
	@$(PIP) install -qq -r requirements/dev.txt
	@touch $@
