# Two commands do everything on a fresh machine: `make demo` and `make test`.
# PYTHON picks the interpreter of the virtual environment, TORCH what is installed into it first; for the oldest release
# TORCH='torch==2.11.0 triton==3.6.0 numpy==2.3.5', since the interpreter of Triton 3.6 fails beside newer NumPy.
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc biasloss_ext -name '*.py' -o -name '*.c*' -o -name '*.h')

.PHONY: demo test lint docs bench bench-peers test-abi test-simulated test-integrations clean

demo: $(VENV)/.installed
	$(BIN)/python -m biasloss_ext.demo --out demo

# Two workers of two threads each share the cores: a thread that waits must sleep, or training tests take three times as long.
test: $(VENV)/.installed lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The site of README.md and docs/, in site/: fails on a broken link, and on a public name that does not exist.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build

# Beside its peers, on this machine; `pytest bench --benchmark-only` has the same through pytest-benchmark.
bench: $(VENV)/.installed
	$(BIN)/python -m biasloss_ext bench --quick

# All of it beside every peer: about 5.5 GB to install, see test-integrations. An hour, on a machine with nothing else to do.
bench-peers:
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install -q torch torchvision 'setuptools>=77' wheel ninja pybind11
	$(VENV)-peers/bin/pip install -q --no-build-isolation -e '.[bench,peers]'
	$(VENV)-peers/bin/python -m biasloss_ext bench

# The wheel of this build under the oldest and the newest torch: the stable ABI's promise.
test-abi: $(VENV)/.installed
	$(BIN)/python -m tests.abi --python $(PYTHON)

# The launchers of the CUDA kernels on the simulated GPU: every schedule, all examples, and every planted fault. Minutes.
test-simulated: $(VENV)/.installed
	BIASLOSS_TEST_SIMULATED=1 $(BIN)/python -m pytest tests/cudasim

# timm and torchvision need a CUDA build of torch beside them (about 5.5 GB); it imports without a GPU.
test-integrations:
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/pip install -q torch torchvision timm
	$(VENV)-integrations/bin/pip install -q 'setuptools>=77' wheel ninja pybind11
	$(VENV)-integrations/bin/pip install -q --no-build-isolation -e '.[train,dev]'
	$(VENV)-integrations/bin/python -m pytest tests/models tests/recipes tests/nn tests/test_acceleration.py tests/test_families.py tests/test_docs.py

$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) 'setuptools>=77' wheel ninja pybind11
	touch $@

# Editable, so that the tests see the tree; the kernels are compiled in place.
$(VENV)/.installed: $(VENV)/.environment $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[train,bench,docs,dev]'
	touch $@

clean:
	rm -rf build dist demo site $(VENV) $(VENV)-integrations $(VENV)-peers *.egg-info biasloss_ext/*.so
