# `make help` lists the targets. Everything runs from .venv, which the first target to need it makes from the lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export TOKENIZERS_PARALLELISM := false
export DVC_NO_ANALYTICS := 1
PROFILE = $(shell sed -nE 's/^profile: *([a-z]+).*/\1/p' params.yaml)
EXHIBITS = $(shell ls results/{$(PROFILE),full}/*/*.json 2>/dev/null | sed 's|\.json$$||')

# Without git, as in an archive of the tree, DVC works only if it is told so.
ifeq ($(wildcard .git .dvc/config.local),)
$(shell printf '[core]\n    no_scm = true\n' > .dvc/config.local)
endif

.DEFAULT_GOAL := help
.PHONY: help reproduce compare test smoke figures full bench reseal lab docs lint pipeline readme torture clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

reproduce: $(READY)  ## fetch the assets, retrain the default profile, draw its exhibits, compare them with the published ones
	python -m limbeck.workflow.progress $(PROFILE)
	python -m limbeck.exhibits.readme
	@echo "The verdicts are in README.md, the pictures and numbers in results/, the executed notebooks in results/default/executed/."
	python -m limbeck.workflow.compare

compare: $(READY)  ## are these the published results? sets every record and exhibit beside HEAD's
	python -m limbeck.workflow.compare

test: $(READY) lint  ## lint, every test, and every notebook as README.md says, in a temporary copy of the tree
	python -m limbeck.assets
	python tests/tree.py test

smoke: $(READY)  ## the whole chain with the smoke profile, in a temporary copy of the tree
	python -m limbeck.assets
	python tests/tree.py smoke

figures: $(READY)  ## draw the exhibits again from the committed records; nothing is retrained
	printf '%s\n' $(EXHIBITS) | sed -E 's|results/([^/]+)/([^/]+)/([^/]+)|notebooks/\2/\3.ipynb profile=\1|' | \
		xargs -P 2 -L 1 python -m limbeck.workflow.notebooks
	python -m limbeck.workflow.metrics default full
	python -m limbeck.workflow.lock
	python -m limbeck.exhibits.readme

full: $(READY)  ## the long experiments (hours on two cores; stop and continue at will)
	python -m limbeck.workflow.progress full
	python -m limbeck.exhibits.readme

bench: $(READY)  ## time the losses and the loop against their alternatives, each in one process, and draw what came out
	python -m limbeck.assets
	python -m limbeck.experiments.sinkd.step_cost
	python -m limbeck.experiments.kdrl.efficiency
	python -m limbeck.experiments.nola.cost
	printf 'notebooks/%s.ipynb\n' sinkd/table_cost kdrl/table_efficiency nola/table_cost | \
		xargs -L 1 python -m limbeck.workflow.notebooks
	python -m limbeck.exhibits.readme

reseal: $(READY)  ## renew the records' hashes after a change of code that changes no number: shown here, to the bit
	python -m limbeck.assets
	python -m limbeck.assets efficientnet_lite0
	python -m limbeck.workflow.reseal || refused=1; python -m limbeck.digests; python -m limbeck.workflow.lock; test -z "$${refused:-}"

lab: $(READY)  ## JupyterLab on localhost, at notebooks/README.md
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}}' \
		> $(VENV)/share/jupyter/lab/settings/overrides.json
	@test $$(id -u) != 0 || echo "You are root, as in a container: Lab gets --allow-root. From outside, forward its port."
	jupyter lab --ip=127.0.0.1 $$(test $$(id -u) != 0 || echo --allow-root) \
		--LabApp.default_url=/lab/tree/notebooks/README.md

docs: $(READY)  ## build the site from what results/ holds; nothing is run
	sphinx-build -W --keep-going -q -j 2 -b html docs data/site/html
	@echo "Open data/site/html/index.html."

lint: $(READY)
	ruff check .
	ruff format --check .

pipeline: $(READY)  ## write digests.json, both dvc.yaml and metrics.json from code, notebooks, params/ and exhibits, and what stands to dvc.lock
	python -m limbeck.digests
	python -m limbeck.workflow.stages
	python -m limbeck.workflow.metrics default full
	python -m limbeck.workflow.lock

readme: $(READY)  ## renew the claims in README.md and results/*.md from the exhibits
	python -m limbeck.exhibits.readme

torture: $(READY)  ## kill, fill the disk, run twice: each kind of stage, in a temporary copy; what was lost (about an hour)
	python tests/torture.py

clean:  ## delete the environment and what was trained, not what was fetched
	rm -rf $(VENV) docs/generated data/site data/checkpoints data/resume data/executed
