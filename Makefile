# `make demo` and `make test` need Python 3.10 or later, and install everything else into .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCHRUN := $(RUN) -m torch.distributed.run --standalone --nproc_per_node=2
WORLD := output/miniature
DEMO := output/demo
LEVEL ?= 4
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(or $(shell command -v python3.10),$(PYTHON))
GPU_PYTHON ?= $(or $(wildcard $(RUN)),$(PYTHON))
export OMP_NUM_THREADS ?= 1

.PHONY: demo bootstrap test test-oldest gpu lint world clean help

help:
	@echo "make demo         train a captioner from scratch on a small world: 8 to 15 minutes on 2 cores, 7 on an AMD Zen 5"
	@echo "make bootstrap    repeat the paper's first tables on the small world (captioning and filtering): 75 minutes on 2 cores"
	@echo "make test         run the tests"
	@echo "make test-oldest  run the main tests with the oldest versions that requirements.txt allows"
	@echo "make gpu          test and measure on a GPU, in $(VENV) or else the Python of PYTHON; writes benchmarks/GPU.md"
	@echo "make lint         check the style"
	@echo "make world        write the small world to $(WORLD); LEVEL=1 to 4, here $(LEVEL)"
	@echo "make clean        remove environments and output"

$(VENV)/installed: requirements.txt requirements-dev.txt
	@echo "== Installing into $(VENV): 3 to 10 minutes, 6 GB"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check --progress-bar on -r requirements-dev.txt
	@touch $@

$(WORLD)/scenes.json: $(VENV)/installed
	@echo "== Writing the small world to $(WORLD): 1 to 2 minutes"
	$(RUN) -m miniature --output $(WORLD) --level $(LEVEL) --train 16000 --videos 100

world: $(WORLD)/scenes.json

demo: $(VENV)/installed world
	@echo "== Training and evaluating a captioner: 6 to 13 minutes; each line shows the time left"
	$(TORCHRUN) train_caption.py --config configs/miniature/caption.yaml --output_dir $(DEMO) --overwrite
	$(RUN) -m demo.exact --results $(DEMO) --world $(WORLD)

bootstrap: $(VENV)/installed
	$(RUN) -m demo.bootstrap --output output/bootstrap

test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

$(OLDEST)/installed: requirements.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	sed 's/>=/==/' requirements.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -r $(OLDEST)/requirements.txt pytest
	@touch $@

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -q tests/test_golden_*.py tests/test_manifest.py tests/test_scripts.py tests/test_predict.py

gpu:
	$(GPU_PYTHON) -m pytest -q -m cuda
	$(GPU_PYTHON) -m benchmarks.throughput

lint: $(VENV)/installed
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) $(OLDEST) output
