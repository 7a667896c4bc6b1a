# `make run` and `make test` set up .venv themselves; Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What the installation is made from: a change builds the C++ core again.
PARTS := pyproject.toml constraints.txt triton.txt CMakeLists.txt $(wildcard csrc/*.* csrc/kernels/*.*)

.PHONY: run test test-gpu lint check docs clean

run: $(VENV)/.run
	@$(BIN)/microscale run

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

# On a machine with a GPU, torch, triton, pytest and nothing else of ours: no build, no .venv.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -q -p no:cacheprovider tests/backends/triton_*on_device.py
	PYTHONPATH=src $(PYTHON) bench/gpu_kernels.py --formats all --only qwen3-30b-a3b 5120x2880 --tokens 1 32 512

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*) $(wildcard src/microscale/backends/*/*.cu src/microscale/backends/*/*.h tests/backends/*.h)

$(VENV)/.run: $(PARTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(PARTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet --requirement triton.txt
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist
