# One virtual environment, made once and made again only when pyproject.toml changes.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
export MPLBACKEND := Agg

.PHONY: demo live test pytest test-further test-core test-slow fuzz mutate lint format bench bench-quick bench-live calibrate peers docs clean

# what the demo needs; the tests add the tools of developers. Python comes with an old pip, which takes half as much
# time again to find and unpack everything.
$(CORE): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[generate]"
	@touch $@

$(READY): $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[dev]"
	@touch $@

demo: $(CORE)
	$(BIN)/braindecode-vis demo

# a simulated subject as a stream, and the page of it: prints the address, Ctrl-C ends both. OPEN=1 opens a browser;
# LIVE="--reconstruct --repetitions" and the like go to the verb `live`.
LIVE ?= --repetitions
OPEN ?=
$(VENV)/.live: $(CORE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[generate,live]"
	@touch $@

live: $(VENV)/.live
	@test -e demo_run/report.html || $(BIN)/braindecode-vis demo --out demo_run
	@$(BIN)/braindecode-vis stream phantom --run demo_run --soa 1 --wait & stream=$$!; \
	  trap 'kill $$stream 2>/dev/null; wait $$stream 2>/dev/null' EXIT; \
	  $(BIN)/braindecode-vis live demo_run --stream phantom $(LIVE) $(if $(OPEN),--open)

# PYTEST has further options, for example --allowed-skips=FILE, with which .ci/run refuses skips. With -j 2, the tests do
# not wait for mypy, which uses one core.
test: lint pytest

pytest: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile $(PYTEST)

# what `make test` leaves out to stay short: further cases of what its tests cover, and long whole runs. .ci/run runs both.
test-further: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "further and not slow" $(PYTEST) $$(grep -rl --include=test_*.py mark.further tests)

# the quick loop: base and flow, without parts and without what is marked `whole`
test-core: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --core $(PYTEST)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 7200

# random changes of operators, numbers and defaults: which does no test notice? The sample of a SEED is fixed.
N ?= 400
SEED ?= 1
mutate: $(READY)
	$(BIN)/python -P tests/mutate.py -n $(N) --seed $(SEED)

# damaged files of every kind: one sentence or the same result. A case that is printed runs again with --case.
CASES ?= 5000
FUZZ_SEED ?= 0
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(FUZZ_SEED) --jobs 2

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# one table beside peers (`make peers` installs those that are missing), one of growth; the quick one writes nothing
bench: $(READY)
	$(BIN)/python benchmarks/table.py --write docs/research/BENCHMARKS.md

bench-quick: $(READY)
	$(BIN)/python benchmarks/table.py --quick

# latency, losses and the cost of causal filters of live decoding: most of an hour
bench-live: $(READY)
	$(BIN)/python benchmarks/live.py --write docs/research/BENCHMARKS.md

# do intervals cover, and p-values hold their level: every kind, 1000 draws a cell; half an hour on one core
calibrate: $(READY)
	$(BIN)/python benchmarks/calibration.py --write docs/research/BENCHMARKS.md

peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[bench]"

# the site, with notebooks that are run where they or the package have changed: build/docs/html/index.html
$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -d build/docs/doctrees docs build/docs/html
	@echo "build/docs/html/index.html"

clean:
	rm -rf build dist docs/generated .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
