# One command each; every target sets up what it needs in .venv first (deploy/setup).
# PYTHON: the interpreter for .venv; left out, a fitting one is looked for.
# TORCH_INDEX: a package index of torch's CPU builds, where the usual one has only CUDA's.
PYTHON      ?=
TORCH_INDEX ?=
VENV        := .venv
BIN         := $(VENV)/bin
# Test processes side by side; only tests that start no stack run so.
JOBS        ?= $(shell nproc)
# Compiled before: else each process compiles what it imports, where Python may not write bytecode.
SOURCES     := engine kvtransfer worker prefill decode coordinator tests
PYTEST       = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --durations=30

# The first Python that runs does the setup, and finds the one for .venv.
define setup
@for python in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python; do \
  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then \
    exec "$$python" -m deploy.setup $(1) --python "$(PYTHON)" --torch-index "$(TORCH_INDEX)"; \
  fi; \
done; \
echo "setup: no Python 3 runs here; Debian, Ubuntu: apt-get install python3 python3-venv" >&2; \
exit 2
endef

.PHONY: demo serve test test-models faults chaos fuzz ecosystem conformance lint protos bench \
        bench-peers clean setup-run setup-dev setup-bench

demo: setup-run
	$(BIN)/python -m coordinator.commands.demo

serve: setup-run
	$(BIN)/coordinator start

# Every test, in four parts (tests/support/parts.py); or TESTS=folder alone. Prints the slowest 30 of
# each part and writes build/junit/*.xml. All parts run, also where the first fails.
test: setup-dev
ifdef TESTS
	$(PYTEST) --junitxml=build/junit/tests.xml $(TESTS) $(PYTEST_ARGS)
else
	@$(BIN)/python -m compileall -q $(SOURCES)
	@JOBS=$(JOBS) $(BIN)/python -m tests.support.parts $(PYTEST_ARGS)
endif

# Real models and tokenizers, which are downloaded into the cache once: make test-models [TESTS=...]
test-models: TESTS ?= tests/models
test-models: setup-dev
	$(PYTEST) --junitxml=build/junit/models.xml $(TESTS) $(PYTEST_ARGS)

# The fault suite at its full length. FULL= gives the shortened form.
faults: FULL ?= --full
faults: setup-dev
	$(PYTEST) --junitxml=build/junit/faults.xml tests/faults $(FULL) $(PYTEST_ARGS)

# Random faults under load: make chaos MINUTES=30 [SEED=n] [CHAOS_ARGS="--lane tcp --out DIR"]
chaos: MINUTES ?= 30
chaos: setup-dev
	$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

# Random input to the public API: make fuzz INPUTS=100000 SEED=n [FUZZ_ARGS="--wire-inputs N"]
fuzz: INPUTS ?= 100000
fuzz: setup-dev
	$(BIN)/python -m tests.faults.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED)) $(FUZZ_ARGS)

# Clients of others against one stack, each in its own environment: make ecosystem [ECOSYSTEM_ARGS="--only smg"]
ecosystem: setup-dev
	$(BIN)/python -m tests.ecosystem $(ECOSYSTEM_ARGS)

# JSON Schemas of others, and whether answers under them are valid: make conformance [CONFORMANCE_ARGS="--sources suite"]
conformance: setup-dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.ecosystem.conformance $(CONFORMANCE_ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python protos/generate.py --check
	$(BIN)/python -m tests.words

protos: setup-dev
	$(BIN)/python protos/generate.py

# BENCH_ARGS: any flags of benchmarks.run, such as "--workloads W1,W2 --repetitions 5 --out DIR".
bench: SYSTEMS ?= ours,ours-nospec
bench: setup-bench
	$(BIN)/python -m benchmarks.run --systems $(SYSTEMS) $(BENCH_ARGS)

bench-peers: SYSTEMS ?= all
bench-peers: setup-bench
	$(BIN)/python -m benchmarks.peers || echo "some peers are left out"
	$(BIN)/python -m benchmarks.run --systems $(SYSTEMS) $(BENCH_ARGS)

setup-run setup-dev setup-bench: setup-%:
	$(call setup,$*)

clean:
	rm -rf $(VENV) build dist *.egg-info
