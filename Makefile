# Everything runs from .venv, which is made again when the lock file or pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_EXTRA := .venv/.installed-extra
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: help demo demo-smollm2 up test test-extra lint docs docs-serve fuzz audit tradeoff bench plan-accuracy packing plan-latency caps load api-speed chaos paper recovery format clean

help:
	@echo "make demo        one real training job through the REST API, from upload to a sample; about 3 minutes"
	@echo "make demo-smollm2  a pretrained model under a cap: LoRA on SmolLM2-135M, beside other ways (docs/smollm2.md); 25 minutes"
	@echo "make up          keep the service running on http://127.0.0.1:8000"
	@echo "make test        checks and tests, against real PostgreSQL and Redis"
	@echo "make test-extra  tests beside transformers, peft and SmolLM2, and those that need docker compose; installs 110 MB more"
	@echo "make fuzz        10,000 hostile requests, then schemathesis for FUZZ_SECONDS=600 (docs/fuzzing.md); FUZZ_SEED=... repeats a run"
	@echo "make audit       ask whether a version in requirements.lock is known to be vulnerable"
	@echo "make lint        only the checks: ruff, mypy, import-linter"
	@echo "make docs        the documentation as a site, in site/; make docs-serve shows it on http://127.0.0.1:8001 as it is written"
	@echo "make tradeoff    measure memory and time against the number of chunks, and draw it (docs/figures)"
	@echo "make bench       measure speed and memory beside other implementations (docs/benchmarks.md); over an hour"
	@echo "make plan-accuracy  run 200 random jobs for two steps and compare with their plans (docs/plan-accuracy.md)"
	@echo "make packing     simulate thousands of jobs on one device, and run three at once (docs/packing.md); 2 minutes"
	@echo "make plan-latency   post hundreds of plans to a running API and time the answers (docs/planner.md)"
	@echo "make caps        run jobs under 20 caps, from too small to plentiful, and plans that are wrong (docs/caps.md)"
	@echo "make load        200 requests a second on 20,000 jobs while one trains, on two cores (docs/load.md); 4 minutes"
	@echo "make api-speed   GET and POST of jobs by wrk, downloads beside nginx, on two cores (docs/api-speed.md); 6 minutes"
	@echo "make chaos       kill, stop and starve everything that runs a job, thousands of times (docs/chaos.md); over an hour"
	@echo "make paper       reproduce the claims of the SLiM paper (docs/paper.md); over an hour, can be continued"
	@echo "make recovery    move SmolLM2 into FAVOR+ attention and see how much of its loss comes back (docs/recovery.md)"
	@echo "make format      let ruff format and fix what it can"
	@echo "make clean       remove .venv, caches and the data in .slimtune"

$(INSTALLED): requirements.lock pyproject.toml slim_core/tensor_heap.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "slimtune needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "install 1/4: .venv with $$($(PYTHON) --version)"
	@# Some distributions ship venv without ensurepip; pip itself can then fill the environment.
	@$(PYTHON) -m venv --clear .venv >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip -qq --python .venv/bin/python install pip; }
	@echo "install 2/4: $(TORCH), the largest download"
	@$(PIP) '$(TORCH)'
	@echo "install 3/4: requirements.lock"
	@$(PIP) -r requirements.lock
	@echo "install 4/4: slimtune itself"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(INSTALLED_EXTRA): requirements-extra.lock $(INSTALLED)
	@echo "install: requirements-extra.lock, what test-extra and demo-smollm2 need"
	@$(PIP) --no-deps -r requirements-extra.lock
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/slimtune demo

demo-smollm2: $(INSTALLED_EXTRA)
	$(BIN)/python -m benchmarks.smollm2

up: $(INSTALLED)
	@$(BIN)/slimtune up

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Exit code 5 of pytest: nothing was collected.
test-extra: $(INSTALLED_EXTRA)
	@$(BIN)/python -m pytest -m extra -rs || \
	  { code=$$?; [ $$code -eq 5 ] && echo "test-extra: no such test here"; [ $$code -eq 5 ]; }

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The variable silences an advertisement.
docs: $(INSTALLED_EXTRA)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean
	@echo "the site is site/index.html; its search needs a server: make docs-serve"

docs-serve: $(INSTALLED_EXTRA)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8001

FUZZ_SECONDS ?= 600

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

audit: $(INSTALLED_EXTRA)
	$(BIN)/python -m tests.audit

tradeoff: $(INSTALLED)
	$(BIN)/python -m benchmarks.tradeoff

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.bench

plan-accuracy: $(INSTALLED)
	$(BIN)/python -m benchmarks.plan_accuracy
	$(BIN)/python -m benchmarks.plan_accuracy --attention softmax --count 100

packing: $(INSTALLED)
	$(BIN)/python -m benchmarks.packing

plan-latency: $(INSTALLED)
	$(BIN)/python -m benchmarks.plan_latency

caps: $(INSTALLED)
	$(BIN)/python -m benchmarks.caps

load: $(INSTALLED)
	$(BIN)/python -m benchmarks.load

api-speed: $(INSTALLED)
	$(BIN)/python -m benchmarks.api_speed

chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos

paper: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper --jobs 2

recovery: $(INSTALLED_EXTRA)
	$(BIN)/python -m benchmarks.recovery

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .slimtune slim_core/_tensor_heap*.so .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
