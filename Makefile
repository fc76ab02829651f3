# Everything works from a fresh checkout: each target first sets up what it needs in .venv.
PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
SEED ?= 17
DATA := data/quickstart
SCALE ?= cpu
DEVICE ?= cpu
RUNS := runs/quickstart/seed$(SEED)
EVIDENCE_DATA := $(if $(filter rows,$(SCALE)),data/rows,$(DATA))

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
# Let Python keep what it compiled: without, each of many processes takes three times as long to import torch.
export PYTHONDONTWRITEBYTECODE :=
# Keep freed memory: giving tensors back to the system at every step costs a CPU run a fifth of its time.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

.PHONY: install quickstart evidence benchmark test test-next test-faults test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --editable '.[dev]'
	touch $@

# A baseline and a TST run on Python source, then their comparison. What is finished is kept: run it again to go on. A run
# whose YAML or data is newer than its end is trained anew.
quickstart: $(DATA)/stats.json
	@echo "Training both runs; follow them with: tail -f $(RUNS)/*.log"
	@$(MAKE) --no-print-directory -j2 $(RUNS)/baseline.done $(RUNS)/tst.done
	$(PYTHON) tools/compare_runs.py $(RUNS)/baseline $(RUNS)/tst --output $(RUNS)/comparison.png

STDLIB = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
PACKAGES = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")

# The standard library (but for folders in s, such as site-packages) and torch: 65 million characters of Python.
SOURCE = "$(STDLIB)/*.py" "$(STDLIB)/[!s]*/**/*.py" "$(PACKAGES)/torch/**/*.py"
PREPARE = $(PYTHON) tools/prepare_data.py $(SOURCE) --output $(@D) --skip-bad --split train=0.995,val=0.005

$(DATA)/stats.json: | install
	$(PREPARE) --seq-len 64 --train-tokenizer 2048

# The same documents in longer rows, for `make evidence SCALE=rows`.
data/rows/stats.json: $(DATA)/stats.json
	$(PREPARE) --seq-len 256 --tokenizer $(DATA)/tokenizer

# Tried twice: StreamingDatasets made at one moment may choose one name for their shared memory. It goes on where it was.
$(RUNS)/%.done: yamls/quickstart/%.yaml $(DATA)/stats.json
	@if [ -e $@ ]; then rm -r $@ $(RUNS)/$*; fi
	@mkdir -p $(RUNS)
	@train() { $(VENV)/bin/llmfoundry train $< variables.folder=$(RUNS) seed=$(SEED) >> $(RUNS)/$*.log 2>&1; }; \
		train || train || { tail -n 20 $(RUNS)/$*.log; exit 1; }
	@touch $@

# Everything docs/evidence.md reports. What is finished is kept: run it again to go on, or elsewhere with KNOWN=record.
evidence: $(EVIDENCE_DATA)/stats.json
	$(PYTHON) tools/evidence.py --data $(EVIDENCE_DATA) --scale $(SCALE) $(if $(KNOWN),--known $(KNOWN))

# What superposition costs, on every core: leave the machine idle for its eleven minutes.
benchmark: install
	$(PYTHON) tools/benchmark.py --device $(DEVICE) --json docs/benchmark_$(DEVICE).json

benchmark: export OMP_NUM_THREADS := $(shell nproc)

test: install
	$(PYTHON) -m pytest --device $(DEVICE)

# The newest torch of the index, or another (TORCH=2.11), with the newest of all else that Composer's pins admit; no
# llm-foundry, which admits one torch alone. Runs what needs none, and torch.compile with its own compiler.
TORCH ?=
NEXT := .venv-next$(addprefix -,$(TORCH))
NEXT_TESTS := attach benchmark embedding epoch_ends families folding functional loader loss loss_triton \
	phase_checkpointer plain_code schedule scheduler superposition used_again weighting

test-next: $(NEXT)/.installed
	PYTHONPATH=$(CURDIR) $(NEXT)/bin/python -m pytest -m 'not faults' -rsfE $(NEXT_TESTS:%=tests/test_%.py)
	$(NEXT)/bin/python tests/versions.py

$(NEXT)/.installed: pyproject.toml
	$(PYTHON3) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet uv
	$(NEXT)/bin/uv pip install --quiet --python $(NEXT)/bin/python 'torch$(if $(TORCH),==$(TORCH).*)' torchvision
	$(NEXT)/bin/uv pip freeze --python $(NEXT)/bin/python | grep -E '^torch(vision)?==' > $(NEXT)/overrides.txt
	$(NEXT)/bin/uv pip install --quiet --python $(NEXT)/bin/python --overrides $(NEXT)/overrides.txt \
		'mosaicml[nlp,peft]>=0.32.1,<0.33' 'mosaicml-streaming>=0.12.0,<0.13' 'wrapt>=1.14,<2' \
		'greenlet>=3,<4' 'hypothesis>=6,<7' 'pytest>=7.2.1,<9' 'typer<1'
	touch $@

# Random kills, two nodes, other ranks, no package, a lost S3 server: what takes too long for `make test`.
test-faults: install
	$(PYTHON) -m pytest -m faults -rP

# torch.compile with its own compiler.
test-slow: install
	$(PYTHON) -m pytest -m slow

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

clean:
	rm -rf $(DATA) data/rows runs/quickstart
