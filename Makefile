# make demo           set up, run the notebook from top to bottom, print the scenarios' results
# make examples       the same for the notebooks in examples/
# make lab            set up, open the notebook in JupyterLab
# make test           set up, run all tests, one process a core (JOBS=0: one, to debug)
# make test-browser   drive the notebook's viewers and OHIF in Chromium (apt-get install chromium)
# make check          set up, check format, lint and types
# make format         put the code into its format
# make notebook       run all notebooks and keep their outputs in them
# make pictures       README's pictures of the notebook and its viewers, after make notebook
# make bench          a slide in and out beside other methods (5 minutes, 13 GB of memory)
# make bench-partial  what reading a part takes as files grow (5 minutes, 6 GB of memory)
# make bench-load     real files in, beside one process with a SET for each chunk (2 minutes)
# make bench-search   searching among a million documents, and the scenarios (30 minutes, 6 GB)
# make bench-series    a series as files and as one array, and a late frame (1 minute)
# make bench-mixed    searches and small reads while a slide streams (8 minutes, 10 GB of memory)
# make bench-tier     a tier before a source: misses, cold loads, eviction (10 minutes, 6 GB)
# make bench-web      DICOMweb beside Orthanc, if it is installed (8 minutes, 6 GB of memory)
# make faults         kill, damage and starve the store at length, and run the property tests with
#                     all their examples: benchmarks/faults.md
# make viewer         the viewer OHIF on what is in Redis, or on FOLDER=... (once: 45 MB from npm)
# make clean          remove what the set-up made

PYTHON ?= python3
JOBS ?= auto
BIN := .venv/bin
# Stamps: a second run does not install again, a changed requirements file does.
RUN := .venv/run-time-is-installed
DEV := .venv/development-is-installed
REDIS := .redis/redis-server
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo examples lab viewer test test-browser check format notebook pictures bench bench-load bench-mixed bench-partial bench-search bench-series bench-tier bench-web faults clean

help:
	@sed -n '/^# /!q; s/^# //p' Makefile

demo: $(RUN) $(REDIS)
	@$(BIN)/python -m demo.run_notebook

examples: $(RUN) $(REDIS)
	@$(BIN)/python -m demo.run_notebook $(sort $(wildcard examples/*.ipynb))

lab: $(RUN) $(REDIS)
	@$(BIN)/jupyter lab dicom_redis.ipynb

notebook: $(RUN) $(REDIS)
	@$(BIN)/python -m demo.run_notebook --in-place dicom_redis.ipynb $(sort $(wildcard examples/*.ipynb))

test: $(DEV) $(REDIS)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-browser: $(DEV) $(REDIS)
	@$(BIN)/python -m pytest -m browser -s

pictures: $(DEV) $(REDIS)
	@$(BIN)/python -m pytest -m '' tests/readme_pictures.py

faults: $(DEV) $(REDIS)
	@PYTHONPATH=. $(BIN)/python tests/faults.py
	@TEST_EXAMPLES=all $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m hypothesis

check: $(DEV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(DEV)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/transfer.py

bench-load: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/load.py

bench-partial: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/partial.py

bench-mixed: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/mixed.py

bench-search: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/search.py

bench-series: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/series.py

bench-tier: $(RUN) $(REDIS)
	@$(BIN)/python benchmarks/tier.py

bench-web: $(DEV) $(REDIS)
	@$(BIN)/python benchmarks/dicomweb.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo 'Python cannot make a virtual environment: apt-get install python3-venv' >&2; exit 1; }

$(RUN): requirements.txt | .venv/bin/python
	@echo 'Installing what the notebook needs into .venv (once, a minute or two) ...'
	@$(PIP) install -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	@echo 'Installing what tests and checks need into .venv (once) ...'
	@$(PIP) install -r requirements-dev.txt
	@touch $@

$(REDIS): | .venv/bin/python
	@echo 'Installing the embedded Redis into .redis (once, 53 MB) ...'
	@$(BIN)/python -m dicomstore.server.embedded install

OHIF := .viewer/package/dist/index.html

viewer: $(RUN) $(REDIS) $(OHIF)
	@$(BIN)/python -m dicomstore.web --viewer $(dir $(OHIF)) $(FOLDER)

$(OHIF):
	@command -v npm >/dev/null || \
		{ echo 'The viewer comes from npm, which is not installed; DICOMweb works without it.' >&2; exit 1; }
	@mkdir -p .viewer && cd .viewer && npm pack --silent @ohif/app@3.13.2 >/dev/null
	@cd .viewer && tar xzf ohif-app-3.13.2.tgz && rm ohif-app-3.13.2.tgz && touch package/dist/index.html

clean:
	rm -rf .venv .redis .viewer
