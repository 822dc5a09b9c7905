# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= out/demo
STAMP = $(VENV)/.installed
LINT_STAMP = $(VENV)/.installed-dev

.PHONY: help demo test lint format bench kernels clean

help:
	@echo "make demo    install into $(VENV), simulate two policies, then profile this machine and hold a"
	@echo "             simulated against a real run; results and plots in $(OUT)"
	@echo "make test    install, lint, type-check and run all tests"
	@echo "make kernels build the CPU kernels (gets the ISPC compiler if need be)"
	@echo "make bench   measure the simulator's speed and memory"
	@echo "make format  format the code"

# pip 25.1 is the first that installs dependency groups (PEP 735).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots,policies,serve]"
	@touch $@

$(LINT_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@

# First a simulated comparison on another machine; then this machine: profiled briefly, and the same short
# workload simulated and run for real, side by side. Without the ISPC compiler torch does the kernels' work.
SMALL = --model stories15m --max-seqs 32 --max-batch-tokens 256 --kv-gpu-blocks 32 --kv-cpu-blocks 600
SHORT = --prompt-lengths around:120:0.3 --output-lengths around:40:0.3 --requests 80 --rate 10
HERE = --hardware $(OUT)/profile/hardware.toml --cost profiled:$(OUT)/profile/cost.json
demo: $(STAMP)
	$(BIN)/neo simulate --policy gpu-only --policy neo --hardware g5.16xlarge --model llama-3.1-8b \
	  --prompt-lengths azure-conv --output-lengths azure-conv --requests 800 --rate 2 --out $(OUT)
	-kernels/build.sh
	$(BIN)/neo profile $(SMALL) --quick --quiet --out $(OUT)/profile
	$(BIN)/neo simulate $(SMALL) $(SHORT) $(HERE) --dtype float32 -p gpu-only -p neo --quiet --out $(OUT)/simulated
	$(BIN)/neo bench $(SMALL) $(SHORT) $(HERE) -p gpu-only -p neo --quiet --out $(OUT)/measured
	$(BIN)/neo show $(OUT)/simulated/gpu-only $(OUT)/measured/gpu-only $(OUT)/simulated/neo $(OUT)/measured/neo

lint: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

kernels:
	kernels/build.sh

# Where ISPC cannot be had, the build says what to install, and the kernels' tests skip with that reason.
test: lint
	-kernels/build.sh
	$(BIN)/pytest

bench: $(STAMP)
	$(BIN)/python benchmarks/simulator_speed.py

format: $(LINT_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
