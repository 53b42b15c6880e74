# bsrgen.  Needs Python 3.11 or newer, a C compiler and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PY     := $(VENV)/bin/python
RESULTS ?= benchmarks/results
WEIGHT := examples/minilm_ffn_32x1_d20.safetensors

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test gpu bench lint clean
.PRECIOUS: $(VENV)/.installed-%

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-test  ## a kernel for a real pruned weight: build it, check it, time it against scipy and dense
	$(PY) -m bsrgen compile $(WEIGHT) -o build/demo
	$(PY) -m bsrgen bench $(WEIGHT) --n 1,32,128

test: $(VENV)/.installed-test  ## the tests on JOBS=2 processes; PYTEST=--full takes every case of the long tables
	$(PY) -m pytest -q -n $(JOBS) $(PYTEST)

gpu: $(VENV)/.installed-test  ## only the tests that need an NVIDIA GPU and nvcc
	$(PY) -m pytest -q -m gpu

bench: $(VENV)/.installed-bench  ## README's grids, or GRIDS="bert pyfr", beside the peers; tables and plots in RESULTS; an hour
	$(PY) -m benchmarks $(GRIDS) $(BENCH) --out $(RESULTS)
	$(PY) -m benchmarks accuracy --out $(RESULTS)/accuracy.json
	$(PY) -m benchmarks report $(RESULTS)/*.json --out $(RESULTS)

lint: $(VENV)/.installed-dev  ## ruff, ruff format and mypy --strict, as pre-commit runs them
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:  ## remove the virtual environment, builds and tool caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bsrgen tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra: pip runs again when pyproject.toml has changed.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	$(PY) -m pip install -q -e '.[$*]'
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"bsrgen needs Python 3.11 or newer, \
	$(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is incomplete: apt-get install python3-venv"; exit 1; }
