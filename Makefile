# `make demo` and `make test` need Python 3.10 or later and nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCHRUN := $(RUN) -m torch.distributed.run --standalone --nproc_per_node=2
WORLD := output/miniature
DEMO := output/demo
LEVEL ?= 4
export OMP_NUM_THREADS ?= 1

.PHONY: demo bootstrap test test-fast lint world clean help

help:
	@echo "make demo    train a captioner from scratch on a small world, about 7 minutes on 2 cores"
	@echo "make bootstrap  what captioning and filtering web texts is worth: the paper's first tables, about an hour"
	@echo "make test    run the tests"
	@echo "make lint    check the style"
	@echo "make world   write the small world to $(WORLD); LEVEL=1 to 4, here $(LEVEL)"
	@echo "make clean   remove $(VENV) and output"

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(WORLD)/scenes.json: $(VENV)/installed
	$(RUN) -m miniature --output $(WORLD) --level $(LEVEL) --train 16000 --videos 100

world: $(WORLD)/scenes.json

demo: $(VENV)/installed world
	$(TORCHRUN) train_caption.py --config configs/miniature/caption.yaml --output_dir $(DEMO) --overwrite
	$(RUN) -m demo.exact --results $(DEMO) --world $(WORLD)

bootstrap: $(VENV)/installed
	$(RUN) -m demo.bootstrap --output output/bootstrap

test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) output
