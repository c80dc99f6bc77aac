# Two commands do everything on a fresh machine: `make demo` and `make test`, which finds nearly everything; `make test-slow` has the rest.
# PYTHON picks the interpreter of the virtual environment, TORCH what is installed into it first; for the oldest release
# TORCH='torch==2.11.0 triton==3.6.0 numpy==2.3.5', since the interpreter of Triton 3.6 fails beside newer NumPy.
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv
BIN := $(VENV)/bin
KERNELS := setup.py build_choices.py $(shell find csrc -name '*.c*' -o -name '*.h')

.PHONY: demo test test-slow test-thorough lint docs bench bench-peers wheel test-wheel test-abi test-simulated test-integrations clean

demo: $(VENV)/.demo
	$(BIN)/python -m biasloss_ext.demo --out demo --epochs 6

# Two workers of two threads each share the cores: a thread that waits must sleep, or training tests take three times as long.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal --durations 25

test: $(VENV)/.installed lint
	$(PYTEST) -m 'not slow'

# What takes more than ten seconds each: sanitizers, interpreted Triton kernels, simulated GPUs, compiled kernels' resources, the commands
# of the documentation.
test-slow: $(VENV)/.installed
	$(PYTEST) -m 'slow and not thorough'

# Tests that take minutes and find little that no faster test finds; run them before a release.
test-thorough: $(VENV)/.installed
	$(PYTEST) -m thorough

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

# One wheel for every Python from 3.10 and every torch from 2.11, in dist/: all instruction sets and GPU architectures. Torch's and
# NVIDIA's libraries stay outside. BIASLOSS_CUDA, BIASLOSS_CPU_VARIANTS and TORCH_CUDA_ARCH_LIST make a smaller one sooner.
wheel: $(VENV)/.installed
	rm -rf build/wheel dist
	$(BIN)/python -m build --no-isolation -o build/wheel
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --plat manylinux_2_34_$$(uname -m) \
		--exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

# The wheel as a stranger installs it: the oldest and the newest Python and torch, no compiler.
test-wheel: wheel
	$(BIN)/python -m tests.wheel dist/*.whl

# The same with the tests of the loss, the ops and the blocks: the stable ABI's promise.
test-abi: wheel
	$(BIN)/python -m tests.wheel dist/*.whl --suite

# The launchers of the CUDA kernels on the simulated GPU: every schedule, all examples, and every planted fault. Minutes.
test-simulated: $(VENV)/.installed
	BIASLOSS_TEST_SIMULATED=1 $(BIN)/python -m pytest tests/cudasim

# timm and torchvision need a CUDA build of torch beside them (about 5.5 GB); it imports without a GPU.
test-integrations:
	$(PYTHON) -m venv $(VENV)-integrations
	$(VENV)-integrations/bin/pip install -q torch torchvision timm
	$(VENV)-integrations/bin/pip install -q 'setuptools>=77' wheel ninja
	$(VENV)-integrations/bin/pip install -q --no-build-isolation -e '.[train,dev]'
	$(VENV)-integrations/bin/python -m pytest tests/models tests/recipes tests/nn tests/test_acceleration.py tests/test_families.py tests/test_docs.py

# --no-compile: Python compiles what is imported, a tenth of what pip would.
$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) .ci/progress 'installing torch' $(BIN)/pip install --no-compile $(TORCH) 'setuptools>=77' wheel ninja
	touch $@

# Compiled in place for this machine alone, and only what changed.
$(VENV)/.kernels: $(VENV)/.environment $(KERNELS)
	$(PYTHON) .ci/progress 'compiling the kernels' $(BIN)/python setup.py -q build_ext --inplace
	touch $@

# The demo needs no CUDA kernels where there is no GPU: they are a third of the compiling. `make test` adds them.
ifeq ($(wildcard $(VENV)/.kernels)$(shell command -v nvidia-smi),)
KERNELS_OF_DEMO := $(VENV)/.cpu-kernels
$(VENV)/.demo: export BIASLOSS_CUDA := 0
else
KERNELS_OF_DEMO := $(VENV)/.kernels
endif

$(VENV)/.cpu-kernels: $(VENV)/.environment $(KERNELS)
	$(PYTHON) .ci/progress 'compiling the kernels for CPUs' $(BIN)/python setup.py -q build_ext --inplace
	touch $@

# Editable, so that the tests see the tree. The demo needs less than the tests.
$(VENV)/.demo: $(KERNELS_OF_DEMO)
	$(PYTHON) .ci/progress 'installing what the demo needs' $(BIN)/pip install --no-compile --no-build-isolation -e '.[train]'
	touch $@

$(VENV)/.installed: $(VENV)/.kernels
	$(PYTHON) .ci/progress 'installing what the tests need' $(BIN)/pip install --no-compile --no-build-isolation -e '.[train,bench,docs,dev]'
	touch $@

clean:
	rm -rf build dist demo site $(VENV) $(VENV)-integrations $(VENV)-peers *.egg-info biasloss_ext/*.so
