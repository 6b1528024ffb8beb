PYTHON ?= $(shell command -v python3.11 || command -v python3)
# `cpu` or `cuda`: which build of the engine is installed.
EXTRA ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
BIN := .venv/bin
INSTALLED := .venv/installed-$(EXTRA)
FREE := 7000

# Where several processes share the cores, idle OpenMP threads sleep instead of spinning.
test slow equality exact faults simulation memory: export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint slow equality exact faults simulation memory bench doctor clean

demo: $(INSTALLED)
	$(BIN)/omni-rollout train experiment=nano_ocr

test: export HF_HUB_OFFLINE = 1
test: $(INSTALLED)
	$(BIN)/pytest -q --durations=10 -m "not gpu and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# What takes longer than CI may: more of verl on Ray, resumed and killed runs.
slow: $(INSTALLED)
	$(BIN)/pytest -q -m "slow and not gpu"

# One process, and verl with one and two ranks under every trainer engine, over the same steps: prints the table.
equality: $(INSTALLED)
	$(BIN)/pytest -q -s -m slow tests/e2e/test_equality.py tests/e2e/test_equality_ahead.py

# Engine against trainer under every instruction set of this CPU and several numbers of threads: rewrites the table of docs/parity.md.
exact: $(INSTALLED)
	$(BIN)/python -m benchmarks.exact

# Kills, hangs, full disks, damaged checkpoints: prints what was kept, repeated, and how long it took.
faults: $(INSTALLED)
	$(BIN)/python -m benchmarks.faults

# The scheduler with 8 to 512 simulated engines: rewrites the tables and plots of docs/scaling.md.
simulation: $(INSTALLED)
	$(BIN)/python -m benchmarks.simulation

# Peak memory of a process with an engine and a trainer, by two sizes of a random model, then of two colocated ranks; 8 GiB.
memory: $(INSTALLED)
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.memory_colocated

# Diffusers, stock vllm-omni, the bare transformer and ours, in turns: rewrites the tables and plots of docs/performance.md.
# Idle threads as each contender's libraries have them.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.speed

doctor: $(INSTALLED)
	$(BIN)/omni-rollout doctor

$(INSTALLED): pyproject.toml
	@df -Pm . | awk 'NR == 2 && $$4 < $(FREE) {print "make: the installation takes 5 GB, and 2 while it runs; " $$4 " MiB are free here, $(FREE) are needed: make room"; exit 1}'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -e ".[$(EXTRA),ocr,verl,dev]"
	$(BIN)/omni-rollout doctor --fix
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
