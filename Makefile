# batchgen: `make run` completes the sample prompts, `make test` checks everything; each sets itself up in .venv.

PYTHON ?= python3
INPUT  ?= data/prompts/sample.jsonl
OUTPUT ?= $(basename $(patsubst %.zst,%,$(patsubst %.gz,%,$(notdir $(INPUT:%/=%))))).completions.parquet
MODEL  ?= tales
ARGS   ?=

# The sample prompts are drawn for: greedy tales go round in circles.
RUN_ARGS := $(if $(ARGS)$(filter-out file,$(origin INPUT)),$(ARGS),--temperature 0.8 --top-p 0.95 --show 5)

BIN := .venv/bin

.PHONY: help
help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: .venv/run  ## Complete prompts: make run [INPUT=prompts.jsonl] [OUTPUT=...] [MODEL=tales] [ARGS="--temperature 0.8"]
ifeq ($(origin INPUT)-$(origin MODEL),file-file)
	@echo "Sample prompts on the embedded model tales. Your own on GPT-2: make run INPUT=prompts.jsonl MODEL=124M (README: Getting GPT-2)"
endif
	@$(BIN)/batchgen generate "$(INPUT)" --output "$(OUTPUT)" --model "$(MODEL)" $(RUN_ARGS)

.PHONY: test
test: lint  ## Lint, check types and run the tests.
	@$(BIN)/pytest -n 2 --dist loadgroup

.PHONY: lint
lint: .venv/dev  ## Lint, formatting, types, and which module may import which.
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

.PHONY: faults
faults: .venv/dev  ## Make every fault happen, many times, and show what came of it (half an hour).
	@$(BIN)/python -m tests.faults $(ARGS)

.PHONY: bench
bench: .venv/dev  ## Measure against transformers, CTranslate2, vLLM and llama.cpp, each in an environment of its own (two hours and a half).
	@$(BIN)/python -m benchmarks.bench $(ARGS)

.PHONY: parity
parity: .venv/parity  ## Compare logits and completions with transformers, on the same random weights.
	@$(BIN)/python -W ignore -m benchmarks.hf_parity $(ARGS)

.PHONY: clean
clean:  ## Remove .venv and caches; outputs stay.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find batchgen jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip runs only when pyproject.toml has changed since it last did. A .venv without pip (cut off in its making) is made anew.
.venv/run: pyproject.toml
	@$(BIN)/python -c 'import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null || { echo "Installing into .venv (once) ..."; $(PYTHON) -m venv --clear .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[report]"
	@touch $@

.venv/dev: .venv/run
	@echo "Installing the development tools into .venv (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

.venv/parity: .venv/run
	@echo "Installing PyTorch and transformers into .venv (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[parity]"
	@touch $@
