# make demo and make test do everything on a fresh machine with Python 3.11 and gcc, set-up included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: setup demo test fuzz test-full test-cuda-wheels lint

setup:
	@PYTHON=$(PYTHON) VENV=$(VENV) $(PYTHON) scripts/setup_env.py

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(PYTEST) -m "not full"

test-full: setup
	$(PYTEST)

# 10,000 damaged checkpoints, each refused in one line or shown harmless; `make test` tries a sample.
fuzz: setup
	$(BIN)/python -m tests.fuzz

# The plugin against the Python code of vLLM's CUDA builds (two wheels of about 330 MB, kept in .cache); part of test-full.
test-cuda-wheels: setup
	$(PYTEST) tests/morphoquant_vllm/test_cuda_wheels.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pymarkdown scan README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs/*/*.md docs/*.md
