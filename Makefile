PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Of pytest. On two cores more of them than cores, since some tests mostly wait; see tests/spreading.py.
WORKERS ?= 3
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.PHONY: help demo test test-gpu lint format clean

help:
	@echo "make demo      generate text with the packaged tiny model, on the CPU"
	@echo "make test      lint, types, tests; tests that need a GPU are skipped without one"
	@echo "make test-gpu  only the tests that need a GPU"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff sort imports and reformat"
	@echo "make clean     remove caches and build output; .venv stays"

demo: $(VENV)/.installed
	$(BIN)/moe-nvfp4 generate --model moe_nvfp4/demo --prompt "Once upon a time" --max-new-tokens 48 --device cpu

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
		|| { echo "make test-gpu: torch sees no CUDA GPU in $(VENV)" >&2; exit 1; }
	$(BIN)/python -m pytest -m "gpu or multi_gpu" $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were installed from, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moe-nvfp4 into $(VENV)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing moe-nvfp4 and its development tools into $(VENV)"
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
		echo "moe-nvfp4 needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
