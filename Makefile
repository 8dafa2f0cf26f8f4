# batchgen: `make run` completes the sample prompts, `make test` checks everything; both install what they need in .venv.

PYTHON ?= python3
INPUT  ?= data/prompts/sample.jsonl
OUTPUT ?= $(or $(filter-out .,$(NAME)),prompts).completions.parquet
MODEL  ?= tales
ARGS   ?=

# The output has the name of its input: data/a.jsonl.gz -> a; of a glob, the folder before it: data/*.jsonl -> data
IS_GLOB = $(findstring *,$(INPUT))$(findstring ?,$(INPUT))$(findstring [,$(INPUT))
FOLDER  = $(dir $(firstword $(subst [, ,$(subst ?, ,$(subst *, ,$(INPUT))))))
NAME    = $(if $(IS_GLOB),$(notdir $(FOLDER:%/=%)),$(basename $(patsubst %.zst,%,$(patsubst %.gz,%,$(notdir $(INPUT:%/=%))))))

# The sample prompts are sampled: with greedy decoding the small model tales repeats itself.
RUN_ARGS := $(if $(ARGS)$(filter-out file,$(origin INPUT)),$(ARGS),--temperature 0.8 --top-p 0.95 --show 5)

BIN  := .venv/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-annotate --custom-compile-command "make lock" --group build --extra report

.PHONY: help
help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: .venv/run  ## Complete prompts: make run [INPUT=prompts.jsonl] [OUTPUT=...] [MODEL=tales] [ARGS="--temperature 0.8"]
ifeq ($(origin INPUT)-$(origin MODEL),file-file)
	@echo "Sample prompts on the embedded model tales. Your own on GPT-2: make run INPUT=prompts.jsonl MODEL=124M (README: Getting GPT-2)"
endif
	@$(BIN)/batchgen generate "$(INPUT)" --output "$(OUTPUT)" --model "$(MODEL)" $(RUN_ARGS) || { code=$$?; \
		test $$code -eq 3 || exit $$code; echo "Some rows are rejected or failed; the output says why." >&2; }

# Hundreds of processes are started: without bytecode on disk, each would compile the project's modules again.
test: export PYTHONDONTWRITEBYTECODE :=
.PHONY: test
test: lint  ## Run lint and all tests.
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: lint
lint: .venv/dev  ## Check style, formatting, types, imports and structure.
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@bad=; $(BIN)/mypy > .venv/mypy.log 2>&1 & mypy=$$!; \
	$(BIN)/lint-imports --no-logo > .venv/lint-imports.log || { cat .venv/lint-imports.log; bad=1; }; \
	$(BIN)/python -m tests.support.structure || bad=1; \
	wait $$mypy || bad=1; cat .venv/mypy.log; test -z "$$bad"

.PHONY: faults
faults: .venv/dev  ## Cause each fault many times and show the outcome (over an hour).
	@$(BIN)/python -m tests.faults $(ARGS)

.PHONY: bench
bench: .venv/dev  ## Compare speed with transformers, CTranslate2, vLLM, OpenVINO and llama.cpp, each in its own environment (3 hours).
	@$(BIN)/python -m benchmarks.bench $(ARGS)

.PHONY: parity
parity: .venv/parity  ## Compare logits and completions with transformers, int8's quality with CTranslate2's (TEXT=tales.txt.xz).
	@$(BIN)/python -W ignore -m benchmarks.hf_parity $(ARGS)
	@$(BIN)/python -W ignore -m benchmarks.quality --large $(if $(TEXT),--text "$(TEXT)")

.PHONY: lock
lock: .venv/lock  ## Update requirements/ after a change of pyproject.toml; ARGS=--upgrade takes the newest versions.
	@$(LOCK) $(ARGS) --extra dev --output-file requirements/dev.txt pyproject.toml
	@$(LOCK) --constraints requirements/dev.txt --output-file requirements/run.txt pyproject.toml

.PHONY: coverage
coverage: .venv/dev  ## Run the tests that need no worker processes and report which lines they cover.
	@$(BIN)/pytest -n 2 -m "not processes" --cov --cov-report=term:skip-covered

.PHONY: clean
clean:  ## Remove .venv and caches; outputs stay.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find batchgen jobs tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# pip runs only after a change of these files. A .venv without pip is incomplete (interrupted) and is made again.
.venv/run: pyproject.toml requirements/run.txt
	@$(BIN)/python -c 'import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null || { echo "Installing into .venv (once) ..."; $(PYTHON) -m venv --clear .venv; }
	@$(PIP) --require-hashes --requirement requirements/run.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "from batchgen.gpt2.machine_code import prepare_kernels; prepare_kernels()"
	@touch $@

.venv/dev: .venv/run requirements/dev.txt
	@echo "Installing the development tools into .venv (once) ..."
	@$(PIP) --require-hashes --requirement requirements/dev.txt
	@touch $@

.venv/parity: .venv/run
	@echo "Installing PyTorch and transformers into .venv (once) ..."
	@$(PIP) --no-build-isolation --editable ".[parity]"
	@touch $@

.venv/lock: .venv/run
	@$(PIP) uv
	@touch $@
