# `make` lists the targets. Each creates or reuses the virtual environment VENV, installs what it
# needs and builds. Stamp files in VENV record what is done.
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3.11 python3,\
  $(shell $(p) -c 'print("$(p)")' 2>/dev/null)) python3)
ARGS ?=
MINUTES ?= 10

IN_VENV := $(VENV)/bin/python
PIP := $(IN_VENV) -m pip --disable-pip-version-check
BUILD_FILES := CMakeLists.txt setup.py pyproject.toml requirements.txt \
  $(wildcard build_backend/*.py csrc/*.* csrc/*/*.* cuda/*.*)
CXX_FILES = $(wildcard csrc/*.h csrc/*.cc csrc/*/*.h csrc/*/*.cc cuda/*.h cuda/*.cu cuda/*.cuh \
  tests/emulator/*.h tests/emulator/*.cc tests/fuzz/*.h tests/fuzz/*.cc bench/*.cc)
# The formatters do not break long strings, macros and words, and do not know all of these files.
WIDTH_FILES := '*.py' '*.h' '*.cc' '*.cu' '*.cuh' '*CMakeLists.txt' '*Makefile'
LINTERS = $(shell grep -oE '(ruff|clang-format)==[0-9.]+' pyproject.toml)

# A machine with a GPU often has a Python with PyTorch, which is used as it is, without a network.
GPU_NEEDS := torch ml_dtypes pybind11 pytest psutil rich
GPU_PYTHON ?= $(shell python3 -c 'import importlib.util, sys; \
  sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' $(GPU_NEEDS) 2>/dev/null \
  && echo python3 || echo $(IN_VENV))

# Two pips at once would corrupt the environment. Ninja uses all cores anyway.
.NOTPARALLEL:
.PHONY: help demo test fuzz bench gpu lint format clean
.PRECIOUS: $(VENV)/.installed-%

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16
	@echo "Overridable: PYTHON=$(PYTHON) VENV=$(VENV)"
	@echo "ARGS= is passed to the program that test, fuzz, bench, gpu or demo runs."

demo: $(VENV)/.installed-demo  ## train three real tasks, pictures in demo_output/
	$(IN_VENV) -m examples $(ARGS)

test: $(VENV)/.installed-test  ## run the tests
	$(IN_VENV) -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

fuzz: $(VENV)/.installed-test  ## compare random calls with the oracle, MINUTES=10 for each test
	TF_CENTER_LOSS_FUZZ_MINUTES=$(MINUTES) $(IN_VENV) -m pytest tests/test_fuzz_paths.py \
	tests/test_fuzz_kernels.py --numprocesses auto --dist load $(ARGS)

bench: $(VENV)/.installed-bench  ## run the benchmarks: the table and the plots
	$(IN_VENV) -m bench $(ARGS)

gpu:  ## on a machine with a GPU: build, test and time the CUDA kernels
	@test $(GPU_PYTHON) != $(IN_VENV) || $(MAKE) $(VENV)/.installed-gpu
	@export PATH="$$PATH:$(abspath $(VENV))/bin"; set -ex; \
	cmake -DTCL_TENSORFLOW=OFF -DPython_EXECUTABLE="$$($(GPU_PYTHON) -c 'import sys; \
	print(sys.executable)')" -S . -B build/gpu; \
	cmake --build build/gpu --parallel; \
	$(GPU_PYTHON) -m pytest tests/gpu --confcutdir=tests/gpu -rs && failed=0 || failed=1; \
	$(GPU_PYTHON) -m bench.gpu $(ARGS); \
	exit $$failed

lint: $(VENV)/.linters  ## check style, change nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	@echo 'Lines over 100 columns (expected none):'
	! git ls-files $(WIDTH_FILES) | LC_ALL=C.UTF-8 xargs grep -nE '.{101}'
	! git ls-files '*.md' | LC_ALL=C.UTF-8 xargs grep -nE '^[^|].{100}' | grep -v 'http'  # no tables

format: $(VENV)/.linters  ## apply the style
	$(VENV)/bin/ruff check --fix --exit-zero
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:  ## remove what was built, but not the virtual environment
	rm -rf build dist demo_output *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f tf_center_loss_op/*.so tf_center_loss_op/_build.json $(VENV)/.installed-*

$(IN_VENV):
	@$(PYTHON) -c '' || { echo "No Python: apt install python3, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) cannot make virtual environments: apt install $$($(PYTHON) -c \
	'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.linters: pyproject.toml | $(IN_VENV)
	$(PIP) install $(LINTERS)
	@touch $@

# The build requirements are installed into the environment. pip's build isolation would download
# them for each build to another path, and everything would be compiled again.
$(VENV)/.requirements: requirements.txt Makefile | $(IN_VENV)
	$(PIP) install -r requirements.txt 'setuptools>=77' pybind11 cmake ninja
	@touch $@

# Without a native library there is no stamp, so the next run tries again.
$(VENV)/.installed-%: $(BUILD_FILES) $(VENV)/.requirements
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@if grep -q '"native": true' tf_center_loss_op/_build.json; then touch $@; \
	else echo "Going on without the native library:"; grep '"reason"' tf_center_loss_op/_build.json; fi
