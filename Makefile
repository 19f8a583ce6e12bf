# make demo    install, prepare an embedded corpus, train a few minutes on a CPU, print samples; MODEL=diffusion, say
# make test    install and run every test
# make bench   speed and memory; AGAINST=path of a nanoGPT checkout measures it side by side
PYTHON ?= python3
MODEL ?= gpt2
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test bench clean

demo: $(VENV)/.installed
	$(PY) demo.py --model_type=$(MODEL)

test: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto

bench: $(VENV)/.installed
	$(PY) bench.py $(if $(AGAINST),--against=$(AGAINST))

$(VENV)/bin/python:
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
