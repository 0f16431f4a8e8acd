# make demo   train, plot and compare on this machine: no GPU, no model or data hub
# make test   the whole test suite
# make lint   ruff, and shellcheck where it is installed
# make clean  remove .venv, caches and the demo's output
#
# PYTHON names the interpreter .venv is made with; OUTPUT the folder of the demo.

PYTHON ?= python3
OUTPUT ?= output_demo
VENV := .venv
# Scripts call plain `python` and `deepspeed`: the ones of .venv.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(RUN) bash training_scripts/single_cpu/run_tiny.sh "$(OUTPUT)"
	$(RUN) bash evaluation_scripts/run_demo.sh "$(OUTPUT)"

test: $(VENV)/.installed-dev
	$(RUN) python tests/compile_kernels.py
	$(RUN) python -m pytest -q -rs -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	if command -v shellcheck >/dev/null; then \
		shellcheck -x -P training_scripts training_scripts/*/*.sh training_scripts/*/*/*.sh evaluation_scripts/*.sh; fi

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis output_demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: made last, so that a broken install is done again and a finished one never.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.installed
