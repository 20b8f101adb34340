# Every target makes what it needs: `make test` and `make compare` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python .ci/install
# Other versions than those of constraints.txt: make VENV=build/old WITH="torch==2.9.0" test
WITH ?=
# Without compiled modules an import of torch takes three times as long, in each of the tests' processes.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.cfg pyproject.toml constraints.txt setup.py .ci/install $(shell find csrc -type f)

.PHONY: help test test-thorough test-distributed test-matrix test-kernels compare tune lint type fmt docs notebooks memory-table gpu gpu-dry-run gpu-tables gpu-tables-dry-run sanitize check-aarch64 check-cuda check-triton wheels test-wheels clean

help:
	@echo "make compare   train a small Llama with SGD, AdamW, Muon and SCALE; print the table"
	@echo "make test      the tests"
	@echo "make test-thorough       all cases of them, and those that take minutes"
	@echo "make test-distributed    all tests of several processes: sharding, the harness, faults"
	@echo "make test-matrix   the tests with every Python, torch, instruction set ... that is here"
	@echo "make test-kernels ISA=baseline    all cases of the kernels, in one instruction set's build"
	@echo "make lint type fmt    ruff, mypy, ruff format"
	@echo "make docs notebooks   build the pages into build/site; execute every notebook"
	@echo "make tune      the learning-rate grids behind 'make compare' (about an hour)"
	@echo "make gpu       on a machine with a GPU: build, test, sanitize, measure"
	@echo "make gpu-tables  on a machine with a GPU: the papers' tables at 60M"
	@echo "make wheels test-wheels  build wheels and an sdist; install and check them, without a compiler"
	@echo "make memory-table     the published memory column beside ours"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "optimzoo needs Python 3.11 or newer; say which with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps are made last, so an interrupted install is done again.
$(VENV)/.bench: $(VENV)/bin/python $(SOURCES)
	@echo "installing into $(VENV) (half a minute, and the download)"
	$(INSTALL) bench $(WITH)
	@touch $@

$(VENV)/.test: $(VENV)/bin/python $(SOURCES)
	@echo "installing into $(VENV), what the tests need too"
	$(INSTALL) bench,test $(WITH)
	@touch $(VENV)/.bench $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) bench,test,dev $(WITH)
	@touch $@

$(VENV)/.docs: $(VENV)/.bench
	$(INSTALL) bench,docs $(WITH)
	@touch $@

compare: $(VENV)/.bench
	$(BIN)/python -m benchmarks compare

tune: $(VENV)/.bench
	$(BIN)/python -m benchmarks compare --tune --out runs/tune

memory-table: $(VENV)/.bench
	$(BIN)/python -m benchmarks reproduce scale-main --memory-only

# One thread a worker: the tests are many and small.
THREADS ?= 1
WORKERS ?= 2
test: $(VENV)/.test
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS)

# The cases that `make test` leaves out (tests/conftest.py), and what takes minutes of CPU; all of
# them, or with PART=2/4 the second quarter.
PART ?= 1/1
test-thorough: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "thorough and not distributed" --part $(PART)

# FSDP2, DDP, tensor parallelism, checkpoints, other world sizes and killed processes, with gloo.
test-distributed: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 1800 tests/distributed/full/distributed_full.py tests/distributed/full

# `make test` in every environment that this machine can make, or in some: ROWS="python3.13
# native-off". Interrupted, it goes on where it stopped; a row that was run for this commit is not
# run again, but with AGAIN=1. What would download a CUDA build of torch waits for CUDA_BUILDS=1. ROTATE=7: one row, the seventh.
ROWS ?=
test-matrix: $(VENV)/.test
	$(BIN)/python tools/test_matrix.py --venv $(VENV) --workers $(WORKERS) \
	  $(if $(AGAIN),--again) $(if $(CUDA_BUILDS),--cuda-builds) \
	  $(if $(ROTATE),--rotate $(ROTATE)) $(ROWS)

# All cases of the CPU kernels, in the build for one instruction set, on a CPU that has a better one.
ISA ?= baseline
test-kernels: $(VENV)/.test
	OMP_NUM_THREADS=1 OPTIMZOO_CPU_ISA=$(ISA) $(BIN)/python -m pytest -n $(WORKERS) \
	  -m "not distributed" tests/kernels/test_kernels.py tests/kernels/test_kernels_cpu.py \
	  tests/kernels/test_kernels_float16.py tests/kernels/test_kernel_inputs.py tests/kernels/test_zoo_kernels.py \
	  tests/optimizers/test_adam_rule.py tests/kernels/test_scale_launch_cache.py tests/sparsity/test_sparsity_masks.py

# With the Python that has the GPU's torch: nothing is installed. Rows come to $(OUT).
OUT ?= runs/gpu
gpu:
	$(PYTHON) -m benchmarks gpu --out $(OUT)

gpu-dry-run: $(VENV)/.test
	$(BIN)/python -m benchmarks gpu --dry-run --out $(OUT)

# The papers' tables on a GPU, on $(TEXT), files of text or a folder of tokens: 60M tokens a method
# after a grid of three rates. Run it again until it ends with 0: each run stops after MINUTES and the
# next goes on; on another machine too, from the rows that were stored. Methods that keep the GPU
# waiting share it well: JOBS=3.
TEXT ?=
MINUTES ?= 8.5
JOBS ?= 1
TABLES ?= scale-main scale-ablation natural-galore low-rank
gpu-tables:
	@test -n "$(TEXT)" || { echo "say which text: make gpu-tables TEXT='train.jsonl.xz ...'"; exit 1; }
	$(PYTHON) -m benchmarks reproduce $(TABLES) --size 60m --seeds 1 --data $(TEXT) \
	  --stop-after $(MINUTES) --jobs $(JOBS) --out runs/gpu-tables --store

gpu-tables-dry-run: $(VENV)/.bench
	$(BIN)/python -m benchmarks reproduce $(TABLES) --size dry --seeds 1 --data stdlib \
	  --max-chars 200000 --out runs/gpu-tables-dry-run

# The kernel tests on a build with the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.test
	$(BIN)/python csrc/build.py --sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OPTIMZOO_CPU_LIBRARY=build/sanitized/_cpu.so OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -m "not distributed" tests/kernels/test_kernels.py \
	  tests/kernels/test_kernels_float16.py tests/kernels/test_kernel_inputs.py \
	  -k "cpu or tensors or float16 or kernel_inputs"

# The same tests on the kernels built for aarch64, in an emulator: g++-aarch64-linux-gnu, qemu-user.
check-aarch64: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tools/check_aarch64.py --allow-missing

# Compiles every CUDA kernel for GPUs that are not here, and looks at the machine code.
check-cuda: $(VENV)/.dev
	$(BIN)/python tools/check_cuda.py --allow-missing

# Compiles every Triton kernel for GPUs that are not here, and looks at the machine code.
check-triton: $(VENV)/.dev
	$(BIN)/python tools/check_triton.py

# Wheels and the sdist into build/wheels, with tools of their own: neither torch nor $(VENV) is needed.
# WITHOUT_CUDA=1 leaves the CUDA library out, a minute and a half of two cores.
WHEEL_TOOLS := build/wheel-tools
$(WHEEL_TOOLS)/.installed: tools/wheels.txt
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install -q --disable-pip-version-check -r tools/wheels.txt
	@touch $@

wheels: $(WHEEL_TOOLS)/.installed
	$(WHEEL_TOOLS)/bin/python tools/build_wheels.py $(if $(WITHOUT_CUDA),--without-cuda)

# What is in build/wheels, in fresh environments with no compiler on PATH: three Pythons and torches,
# or some: ENVIRONMENTS="python3.12-torch2.9.0". A CUDA build of torch waits for CUDA_BUILDS=1.
test-wheels: $(WHEEL_TOOLS)/.installed
	$(WHEEL_TOOLS)/bin/python tools/test_wheels.py $(if $(CUDA_BUILDS),--cuda-builds) $(ENVIRONMENTS)

# The pages, without a warning and without anything that is fetched from elsewhere.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --site-dir build/site

notebooks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=120 -n 2 notebooks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev
	$(BIN)/mypy

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
