# Every target sets itself up on a fresh machine: a virtual environment in .venv with versions from constraints.txt.
# It installs what it needs and no more: `make demo` the package alone, `make test` the test tools as well. Tests and
# `make budget` also compile kernels with a second Triton, that of torch 2.11, whose code is not the same.
#   make demo        pretrain florence_nano on the shipped images, test it on an artist it has never seen
#   make demo-long   the same for up to an hour; either, interrupted, continues where it stopped
#   make test        the quick tests          make test-all   the slow ones too
#   make native      the C++ kernels, built again where csrc/ has changed
#   make sanitize    the tests of the C++ kernels under AddressSanitizer and UBSan
#   make amx         the same tests, on any processor with AVX-512 and bf16, of the code for AMX's tiles
#   make compat      the tests of accelerate with the oldest and newest releases of other libraries
#   make budget      every kernel compiled for A100 and H100/H200, without either, and held to its limits
#   make gpu         everything that waits for a GPU; installs nothing: PYTHON must have PyTorch and Triton
#   make bench       what a processor can show: losses, towers, gradient cache, start; the report drawn
#   make bench-cpu   what the native CPU backend gains on this processor, beside its goals; about 13 minutes
#   make report      charts and tables of what was measured, from bench/results
#   make docs        this documentation as a site in build/site; every warning is an error
#   make release-check  source archive and wheel, built, installed without a compiler, the README's examples run
#   make lint        ruff, and basedpyright   make clean      forget the environment and every cache
# PYTHON picks the interpreter. TORCH_INDEX adds a package index to look for PyTorch in: its
# wheels for CPUs, https://download.pytorch.org/whl/cpu, save gigabytes of CUDA on a machine without a GPU.

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= $(shell nproc)

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# One process a core, each with one thread: threads of two tests that wait for one core slow both down.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses $(JOBS) --dist loadscope

.PHONY: demo demo-long test test-all lint native sanitize amx compat budget bench bench-cpu gpu report docs release-check clean

demo: native
	$(BIN)/florence-fast demo --resume --out runs/demo

demo-long: native
	$(BIN)/florence-fast demo --long --resume --out runs/demo-long

test: .venv/ready .venv/triton-3.6.0/ready native
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/ready .venv/triton-3.6.0/ready native
	$(PYTEST) -m "not gpu"

native: .venv/base
	$(BIN)/python setup.py --quiet build_ext --inplace

# The sanitizers' runtime has to be in the process before Python is, which itself leaks on purpose.
sanitize: VARIANT = FLORENCE_FAST_SANITIZE=1
sanitize: PRELOAD = $(foreach library,asan ubsan stdc++,$(shell c++ -print-file-name=lib$(library).so))
amx: VARIANT = FLORENCE_FAST_EMULATE_AMX=1
sanitize amx: .venv/ready
	rm -f florence_fast/_C*.so
	$(VARIANT) $(BIN)/python setup.py --quiet build_ext --inplace --build-temp build/$@
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest --quiet -m "native and not slow"; status=$$?; rm -f florence_fast/_C*.so; exit $$status

# Their packages stay in build/compat, from one run to the next.
compat: .venv/ready native
	$(BIN)/python -m bench.cpu.releases

budget: .venv/ready .venv/triton-3.6.0/ready
	$(BIN)/python -m bench.budget --full --check --require-both --summary bench/results/budget.json --charts docs
	$(BIN)/python -m bench.report.page
	$(BIN)/python -m bench.gpu.queue

bench: .venv/ready native
	$(BIN)/python -m bench.cpu

bench-cpu: .venv/ready native
	$(BIN)/python -m bench.cpu.native

gpu:
	$(PYTHON) -m bench.gpu

report: .venv/base
	$(BIN)/python -m bench.report

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

release-check: .venv/ready
	$(BIN)/python scripts/release_check.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an installation that was cut short is done again.
.venv/base: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import re, sys; need = re.search(r"requires-python = .>=3\.(\d+)", open("pyproject.toml").read())[1]; sys.exit(sys.version_info < (3, int(need)) and f"Python 3.{need} or newer is needed here: make PYTHON=python3.{need}")'
	$(PYTHON) -m venv .venv
	$(INSTALL) setuptools pybind11 ninja
	FLORENCE_FAST_NO_NATIVE=1 $(INSTALL) --no-build-isolation --editable .
	@touch $@

.venv/ready: .venv/base
	FLORENCE_FAST_NO_NATIVE=1 $(INSTALL) --no-build-isolation --editable '.[test,dev,tensorboard]'
	@touch $@

.venv/docs: .venv/base
	FLORENCE_FAST_NO_NATIVE=1 $(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@

.venv/triton-3.6.0/ready: .venv/base
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-3.6.0 triton==3.6.0
	@touch $@
