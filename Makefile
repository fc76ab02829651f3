# Everything works from a fresh checkout: each target first sets up what it needs in .venv.
PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
SEED ?= 17
MINUTES ?= 15
DATA := data/quickstart
SCALE ?=
DEVICE ?= cpu
RUNS := runs/quickstart/seed$(SEED)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
# Let Python keep what it compiled: without, each of many processes takes three times as long to import torch.
export PYTHONDONTWRITEBYTECODE :=
# Keep freed memory: giving tensors back to the system at every step costs a CPU run a fifth of its time.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296

.PHONY: help install quickstart evidence benchmark benchmark-data wheel test test-next test-faults test-slow test-fuzz \
	test-fuzz-data test-pythons mutants lint clean

# Targets of a group: after ##, a target's comment has the group and what the target does.
define list
	@printf '$(2)\n'
	@sed -n 's/^\([a-z-]*\):.*## $(1): \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'
endef

help: ## start: this list
	$(call list,start,Start)
	$(call list,check,\nCheck a change)
	$(call list,measure,\nMeasure)

install: $(VENV)/.installed ## start: everything into .venv, one to seven minutes, 7 GB

# uv does not mind a Python that is too new: so it is looked at first. It shows what it downloads, 7 GB with torch's CUDA parts.
$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON3) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else \
		"$(PYTHON3) is Python %d.%d: composer-tst needs 3.10 to 3.13, name one as in make PYTHON3=python3.12." % v)'
	@echo "Setting up $(VENV): one to seven minutes, 7 GB"
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet uv
	$(VENV)/bin/uv pip install --python $(PYTHON) --editable '.[dev]'
	touch $@

quickstart: $(DATA)/stats.json ## start: trains a plain and a TST run, and draws the two (SEED=17), ten minutes
	$(PYTHON) -m tools.quickstart --data $(DATA) --runs $(RUNS) --seed $(SEED)
	$(VENV)/bin/composer-tst compare $(RUNS)/baseline $(RUNS)/tst --output $(RUNS)/comparison.png

STDLIB = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
PACKAGES = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")

# The standard library (but for folders in s, such as site-packages) and torch: 65 million characters of Python.
# By their names, since a pattern would leave out those that begin with _, as what Spark leaves.
SOURCE = $$(find -L "$(STDLIB)" "$(PACKAGES)/torch" -path "$(STDLIB)/s*/*" -prune -o -name '*.py' -print)
PREPARE = $(VENV)/bin/composer-tst prepare-data $(SOURCE) --format text --output $(@D) --skip-bad --split train=0.995,val=0.005

$(DATA)/stats.json: | install
	$(PREPARE) --seq-len 64 --train-tokenizer 2048

# The same documents in longer rows, for the evidence.
data/rows/stats.json: $(DATA)/stats.json
	$(PREPARE) --seq-len 256 --tokenizer $(DATA)/tokenizer

# The source of everything that is installed, each text once.
data/corpus/python.jsonl: | install
	$(PYTHON) -m tools.experiments.corpus $@
data/tokens/stats.json: | data/corpus/python.jsonl
	$(VENV)/bin/composer-tst prepare-data data/corpus/python.jsonl --output $(@D) --seq-len 128 --train-tokenizer 2048 --skip-bad \
		--split train=0.962,val=0.005,limited=0.031,rest=0.002

# Dictionaries and manuals of Debian 12, where apt-get has them. The record has dict-gcide 0.48.5+nmu2, dict-wn 3.0-37,
# dict-foldoc 20230119-1, dict-jargon 4.4.7-3.1 and linux-doc-6.1 6.1.192-3.
data/corpus/prose.jsonl: | install
	mkdir -p data/debian && cd data/debian && apt-get download dict-gcide dict-wn dict-foldoc dict-jargon linux-doc-6.1 && \
		for package in *.deb; do dpkg-deb -x "$$package" . || exit 1; done
	$(PYTHON) -m tools.experiments.corpus $@ data/debian
data/prose/stats.json: | data/corpus/prose.jsonl
	$(VENV)/bin/composer-tst prepare-data data/corpus/prose.jsonl --output $(@D) --seq-len 128 --train-tokenizer 2048 --skip-bad \
		--split train=0.98,val=0.02

# What the record lacks, and the data for it: on two threads some seven hours for 80 tokens per parameter. Kill
# it at any time: it goes on where it was.
evidence: install ## measure: trains what docs/evidence.md reports and lacks (SCALE=python-40-4096 for one scale), a day for all
	$(PYTHON) -m tools.experiments.run $(addprefix --scale ,$(SCALE))

# What superposition costs, on every core: leave the machine idle for its twelve minutes.
benchmark: install ## measure: what superposition costs (DEVICE=cpu), twelve minutes on an idle machine
	$(PYTHON) -m tools.benchmarks.run --device $(DEVICE) --json docs/benchmark_$(DEVICE).json

benchmark: export OMP_NUM_THREADS := $(shell nproc)

# What preparing data costs beside llm-foundry's converter, datatrove (in an environment of its own, DATATROVE=PYTHON of
# it, where there is one) and a plain pool of processes, on every core: leave the machine idle.
benchmark-data: install ## measure: what preparing data costs, on an idle machine
	$(PYTHON) -m tools.benchmarks.data_preparation speed $(if $(DATATROVE),--datatrove $(DATATROVE))

# In an environment of its own, of three small packages.
wheel: ## start: dist/*.whl; REPOSITORY=https://... makes the links of its page absolute
	$(PYTHON3) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet 'build>=1,<2'
	$(VENV)-wheel/bin/python -m build

test: install ## check: the test suite (DEVICE=cpu)
	$(PYTHON) -m pytest -n 2 --dist loadgroup --device $(DEVICE)

# The wheel alone, beside the newest torch (or another, TORCH=2.11) and transformers of the index, and the newest of all
# else that Composer's pins admit; no llm-foundry, which admits one torch alone. Runs what needs none, torch.compile with
# its own compiler, and the examples, in a copy of the checkout that lacks the package.
TORCH ?=
NEXT := .venv-next$(addprefix -,$(TORCH))
NEXT_PYTHON := $(CURDIR)/$(NEXT)/bin/python
NEXT_UV := $(NEXT)/bin/uv
NEXT_COPY := build/$(NEXT)
NEXT_TESTS := tests/ops tests/unit tests/integration/test_epoch_ends.py tests/integration/test_families.py \
	tests/integration/test_phase_checkpointer.py tests/integration/test_plain_code.py \
	tests/integration/test_superposition.py tests/integration/test_used_again.py tests/repository/test_benchmarks.py \
	tests/repository/test_examples.py

test-next: $(NEXT)/.installed ## check: the wheel without llm-foundry, on the newest torch (TORCH=2.11 for another)
	rm -rf $(NEXT_COPY)
	$(NEXT_UV) build --quiet --python $(NEXT_PYTHON) --out-dir $(NEXT_COPY)/dist
	$(NEXT_UV) pip install --quiet --python $(NEXT_PYTHON) --no-deps --reinstall $(NEXT_COPY)/dist/*.whl
	cp -R README.md docs examples tests tools pyproject.toml $(NEXT_COPY)
	cd $(NEXT_COPY) && export PYTHONPATH= && $(NEXT_PYTHON) tests/common/versions.py && \
		$(NEXT_PYTHON) -m pytest -m 'not faults' -rsfE $(NEXT_TESTS)

$(NEXT)/.installed: Makefile pyproject.toml
	$(PYTHON3) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet uv
	$(NEXT_UV) pip install --quiet --python $(NEXT_PYTHON) 'torch$(if $(TORCH),==$(TORCH).*)' torchvision \
		transformers accelerate peft
	$(NEXT_UV) pip freeze --quiet --python $(NEXT_PYTHON) | \
		grep -E '^(torch|torchvision|transformers|accelerate|peft|huggingface-hub|tokenizers)==' > $(NEXT)/overrides.txt
	$(NEXT_UV) pip install --quiet --python $(NEXT_PYTHON) --overrides $(NEXT)/overrides.txt \
		'mosaicml[nlp,peft]>=0.32.1,<0.33' 'mosaicml-streaming>=0.12.0,<0.13' 'wrapt>=1.14,<2' \
		'greenlet>=3,<4' 'hypothesis>=6,<7' 'pytest>=7.2.1,<9' 'typer<1' 'zstandard>=0.20,<1'
	touch $@

# Random kills, two nodes, other ranks, no package, a lost S3 server: what takes too long for `make test`.
test-faults: install ## check: kills, lost nodes, a lost server, five to ten minutes
	$(PYTHON) -m pytest -m faults -rP

test-fuzz: install ## check: random runs against a plain simulation (SEED=17 MINUTES=15)
	PYTHONPATH=tests $(PYTHON) tests/slow/fuzz_runs.py --seed $(SEED) --minutes $(MINUTES)

mutants: install ## check: changes of the core that no test notices
	$(PYTHON) -m tools.mutants

test-pythons: install ## check: an environment and a short test for every Python that is found
	bash tests/slow/pythons.sh $(abspath $(VENV)/bin/uv)

test-slow: install ## check: torch.compile with its own compiler, a loss of 13 GB, checkpoints on S3
	$(PYTHON) -m pytest -m slow --device $(DEVICE)

# Random inputs, outputs and mishaps of `composer-tst prepare-data`, for MINUTES from SEED on.
test-fuzz-data: install ## check: random inputs and kills of prepare-data (SEED=17 MINUTES=15)
	PYTHONPATH=tests $(PYTHON) tests/slow/fuzz_prepare_data.py --seed $(SEED) --minutes $(MINUTES)

lint: install ## check: formatting, lint and type check
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

clean: ## start: removes the quickstart's data and runs
	rm -rf $(DATA) data/rows runs/quickstart
