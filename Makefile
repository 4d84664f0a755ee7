# make paper | tables | test | test-all | bench; each does its own set-up. `make help` lists all.
.DEFAULT_GOAL := help
PROFILE ?= demo
JOBS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV := 0.13.8
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
.PHONY: help setup paper tables test test-all faults bench notebooks outputs lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

setup: .venv/.complete data ## .venv with the pinned packages, the embedded images

.venv/.complete: requirements.txt pyproject.toml
	@echo "xbench: installing the pinned packages into .venv"
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "xbench: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11")'
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@.venv/bin/python -m pip install -q --disable-pip-version-check uv==$(UV)
	@.venv/bin/python -m uv pip install -q --python .venv/bin/python --compile-bytecode -r requirements.txt
	@.venv/bin/python -m uv pip install -q --python .venv/bin/python --no-deps -e .
	@touch $@

data: data.dvc dvcstore | .venv/.complete
	@dvc pull -q data.dvc
	@touch data

paper: setup ## run what is not up to date and write paper/$(PROFILE)/; PROFILE=lite|full, JOBS=n
	@python -m xbench.pipeline paper $(PROFILE) $(if $(JOBS),--jobs $(JOBS))

tables: setup ## draw paper/$(PROFILE)/ from the stored records of its runs; trains nothing, needs no images
	@python -m xbench.pipeline paper $(PROFILE) --stored $(if $(JOBS),--jobs $(JOBS))

test: setup ## notebooks and scenarios, some minutes
	@ruff check -q benchmarks nbs tests
	@pytest -m "not slow"

test-all: setup ## all of `test`, and what takes longer
	@ruff check -q benchmarks nbs tests
	@pytest

faults: setup ## 100 kills, compared with an uninterrupted run
	@python tests/faults.py 100

bench: setup ## speed of all parts beside others; writes benchmarks/results/
	@python benchmarks/xscore.py
	@python benchmarks/data.py
	@python benchmarks/train.py
	@python benchmarks/plan.py
	@python benchmarks/cost.py
	@python benchmarks/pipeline.py

notebooks: setup ## after an edit: export, derive the pipelines, write README.md, clean
	@nbdev_export
	@python -m xbench.pipeline derive
	@python -m xbench.pipeline readme
	@nbdev_clean

outputs: setup ## execute the library's notebooks and keep their outputs
	@find nbs -name '*.ipynb' -not -path '*/studies/*' -not -name '.*' -print0 | xargs -0 -n1 -P2 python -m xbench.pipeline refresh
	@nbdev_clean

lock: ## compile requirements.in to requirements.txt
	@uv pip compile -q requirements.in -o requirements.txt --universal --no-emit-index-url --python-version 3.11 --no-annotate --no-header

clean: ## remove what the pipeline made; keeps .venv and published results
	@rm -rf build packed work results/demo paper/demo dvc_plots
