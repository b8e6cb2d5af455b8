# What the README tells a user to type. VENV= uses the active environment (conda) instead of .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(if $(VENV),$(VENV)/bin/)
READY  := $(or $(VENV),.snakemake)/.ready

.PHONY: setup demo test bench gpu ui clean

setup: $(READY)

$(READY): requirements.lock setup.py $(wildcard csrc/*)
	@$(if $(VENV),$(PYTHON) -c "import ensurepip" 2> /dev/null || \
		{ echo "make needs $(PYTHON) with its venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; })
	$(if $(VENV),$(PYTHON) -m venv $(VENV))
	$(BIN)pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)pip install --quiet --disable-pip-version-check --no-deps nuscenes-devkit==1.2.0   # asks for numpy 1, runs with 2
	$(BIN)python -m swconv build --out build/build.json
	mkdir -p $(@D) && touch $@

demo: setup
	$(BIN)snakemake --cores all reports/table2.md --config profile=mini seeds=0,1,2
	@echo
	@echo "Table 2 is in reports/table2.md (figure: reports/figures/table2_distance.svg)."
	@echo "Compare the runs in MLflow: make ui, then open http://127.0.0.1:5000."

test: setup
	$(BIN)ruff check .
	$(BIN)lint-imports
	OMP_WAIT_POLICY=PASSIVE $(BIN)python -m pytest -n 2 --dist loadfile -m "not slow"

bench: setup
	$(BIN)python -m swconv bench operator --out reports/bench
	$(BIN)python -m swconv bench data --out reports/bench
	$(BIN)python -m swconv bench training --out reports/bench
	$(BIN)python -m swconv bench downstream --out reports/bench

# Tests, then times, each result written as soon as it is there. With VENV= it takes the active environment as it is: torch,
# torchvision, timm, numpy, safetensors, ninja and pytest are enough. While the tests run, the networks that throughput wants
# compiled are; with pytest-xdist the tests share the cores with that.
gpu: export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/build/inductor
gpu: $(if $(VENV),setup)
	$(BIN)python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu needs a GPU that torch sees.')"
	$(BIN)python -m swconv build --out build/build.json
	$(BIN)python -m swconv bench compile --device cuda --out $$TORCHINDUCTOR_CACHE_DIR & \
		$(BIN)python -m pytest -q -p no:benchmark $$($(BIN)python -c "import xdist" 2> /dev/null && printf %s -n8) $(wildcard tests/*/test_gpu.py); \
		tests=$$?; wait; exit $$tests
	$(BIN)python -m swconv bench operator --device cuda --out reports/bench
	$(BIN)python -m swconv bench training --device cuda --out reports/bench
	$(BIN)python -m swconv bench throughput --device cuda --out reports/bench
	@if $(BIN)python -c "import faster_coco_eval" 2> /dev/null; then \
		$(BIN)python -m swconv bench downstream --device cuda --out reports/bench; \
		else echo "Detection is not timed: faster-coco-eval is not installed."; fi

ui: setup
	$(BIN)python -m swconv ui

clean:
	rm -rf build swconv/*.so
