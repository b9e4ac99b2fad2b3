# Everything is set up on first use: `make train` and `make test` need Python 3.10-3.12, a C++ compiler and a package index.
# the first interpreter that really runs and is of a supported version (a version manager's shim may exist and not run)
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
CONFIG ?= ds_configs/smoke_et_vit_fmnist.json
# DeepSpeed's compiled extension is built once here, before any time limit starts
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.torch_extensions
# a GPU machine trains on up to RANKS of its GPUs, another one on RANKS gloo processes
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c "^GPU ")
LAUNCH := $(if $(filter 0,$(GPUS)),$(BIN)/deepspeed --num_accelerators $(RANKS),$(BIN)/deepspeed --num_gpus $(shell echo $$(( $(GPUS) < $(RANKS) ? $(GPUS) : $(RANKS) ))))

.PHONY: setup train measure plan test test-all test-kernels lint docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml tools/build_extensions.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"Python 3.10-3.12 is needed, found {v[0]}.{v[1]}; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python tools/build_extensions.py
	@touch $@

plan: setup
	$(BIN)/efftrain plan $(CONFIG) --world $(RANKS)

measure: setup
	$(LAUNCH) launch/train.py --ds_config $(CONFIG) --measure

train: setup
	$(LAUNCH) launch/train.py --ds_config $(CONFIG)

# one process for each core where a test is one process; the others start two ranks themselves and run one by one
ALONE := -n logical --maxprocesses 8 --dist loadfile tests/unit tests/kernels
RANKED := tests/distributed tests/faults

test: SELECT := -m "not slow"
test test-all: setup lint
	@status=0; $(BIN)/python -m pytest $(SELECT) $(ALONE) || status=$$?; \
	$(BIN)/python -m pytest $(SELECT) $(RANKED) || status=$$?; exit $$status

test-kernels: setup
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder tests/kernels

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/make_config_docs.py --check

docs: setup
	$(BIN)/python tools/make_config_docs.py

clean:
	rm -rf $(VENV) .torch_extensions build dist *.egg-info runs shards
