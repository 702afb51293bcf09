# make demo and make test do everything on a fresh machine with Python 3.11 and g++, set-up included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Two processes share the tests. More need more memory: each may start an engine.
WORKERS ?= -n 2 --dist loadscope --no-loadscope-reorder

.PHONY: setup demo test gpu gpu-full fuzz test-full test-cuda-wheels lint

setup:
	@PYTHON=$(PYTHON) VENV=$(VENV) $(PYTHON) scripts/setup_env.py

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(PYTEST) $(WORKERS) -m "not full"

test-full: setup
	$(PYTEST) $(WORKERS)

# On a machine with a GPU, in an environment that has vLLM's CUDA build and this project: nothing is installed.
GPU_PYTHON ?= $(PYTHON)
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

gpu-full:
	$(GPU_PYTHON) -m benchmarks.gpu --full

# 10,000 damaged checkpoints, each refused in one line or shown harmless; `make test` tries a sample.
fuzz: setup
	$(BIN)/python -m tests.fuzz

# The plugin against the Python code of vLLM's CUDA builds (four wheels of about 330 MB, kept in .cache); part of test-full.
test-cuda-wheels: setup
	$(PYTEST) tests/morphoquant_vllm/test_cuda_wheels.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/pymarkdown scan README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md examples/*.md docs/*/*.md docs/*.md
