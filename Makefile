# make demo      install, prepare an embedded corpus, train a few minutes on a CPU, print samples; MODEL=diffusion, say
# make test      install and run the tests, in at most 6 minutes on 2 cores
# make test-all  the slow ones too
# make gpu       what a GPU makes of all this, written to gpu_report.md; installs nothing; AGAINST as for bench
# make bench     speed and memory; AGAINST=path of a nanoGPT checkout measures it side by side
PYTHON ?= python3
MODEL ?= gpt2
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-all bench gpu clean

# The demo is the four commands of a first-time user. OUT is the folder of its run, DATA that of the data sets, and ARGS are
# more settings of train.py.
DATA ?= data
OUT ?= out-demo$(if $(filter-out gpt2,$(MODEL)),-$(MODEL))
ARGS ?=
CORPUS = $(DATA)/python_bpe1024/meta.json

demo: $(VENV)/.installed $(CORPUS)
	$(or $(DEMO_$(MODEL)),$(DEMO_gpt2))

define DEMO_gpt2
$(PY) train.py config/train_python.py --init_from=auto --model_type=$(MODEL) --data_dir=$(DATA) --out_dir=$(OUT) $(ARGS)
$(PY) evaluate.py --out_dir=$(OUT)
$(PY) sample.py --out_dir=$(OUT) --start='def ' --num_samples=3 --max_new_tokens=150
endef

define DEMO_diffusion
$(PY) train.py config/train_diffusion_python.py --init_from=auto --data_dir=$(DATA) --out_dir=$(OUT) $(ARGS)
$(PY) evaluate.py --out_dir=$(OUT)
$(PY) generate_diffusion.py --out_dir=$(OUT) --start='def ' --max_new_tokens=120 --strategy=random --max_steps=4 --animate=True
endef

define DEMO_drifting
$(PY) train.py config/train_python.py --init_from=auto --data_dir=$(DATA) --out_dir=$(OUT)-encoder $(ARGS)
$(PY) train.py config/train_drifting_python.py --init_from=auto --encoder=$(OUT)-encoder --data_dir=$(DATA) --out_dir=$(OUT) $(ARGS)
$(PY) sample.py --out_dir=$(OUT)
endef

$(CORPUS): | $(VENV)/.installed
	$(PY) prepare.py python --tokenizer=bpe:1024 --data_dir=$(DATA)

test: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto -m "not slow"

test-all: $(VENV)/.installed-dev
	$(PY) -m pytest -n auto -m slow

bench: $(VENV)/.installed
	$(PY) bench.py $(if $(AGAINST),--against=$(AGAINST))

# With the python that has torch: such a machine may be offline, and its torch is the one that fits its card.
gpu:
	$(PYTHON) -m experiments.gpu_report $(if $(AGAINST),--against=$(AGAINST)) $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer: make PYTHON=...'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'install the venv module, on Debian python3-venv'; exit 1; }

# A stamp file is newer than the list it was installed from, so a second call installs nothing.
$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
