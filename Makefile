# make run and make test set up everything by themselves, in .venv.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
COMPILE = uv pip compile -q --extra dev --python-version 3.11 --no-header pyproject.toml -o requirements.lock
export PATH := $(abspath $(BIN)):$(PATH)

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/installed  ## the environment, from requirements.lock, into .venv

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $$(grep '^uv==' requirements.lock)
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync -q --compile-bytecode requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install -q --no-deps --no-build-isolation -e .
	touch $@

run: install  ## the training pipeline on the synthetic sample; report in runs/latest/report/index.html
	skin-lesion run training

test: install notebooks  ## every notebook and every test that is not marked slow
	pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu'

notebooks: install  ## executes every notebook; 40_register runs the three steps that it needs
	nbdev-test --n-workers 2 --timing --skip-file-re '^[_.]|^(10_prepare|20_train|30_evaluate)'

bench: install  ## the long checks, and the figures under bench/
	pytest -m slow --timeout 5400 -s

TRAINING = bench_training bench_scale bench_unknown combine distributed experiments search machine prepare_memory training
bench-training: install  ## the input pipeline beside timm's loader, and on a GPU beside synthetic batches; data, search and training at full size; figures under bench/
	pytest $(TRAINING:%=tests/test_%.py) tests/test_bench.py -k 'not engine and not imbalance' -m slow --timeout 5400 -s

bench-quality: install  ## five folds, their average and the network that they teach on HAM10000, from nothing but the data: PROFILE=full on a GPU
	pytest tests/test_bench_quality.py -m slow --timeout 86400 -s

bench-recipe: install  ## what each knob of the training recipe does in a short training on HAM10000, an hour on two cores; figures under bench/
	pytest tests/test_bench_recipe.py -m slow --timeout 10800 -s

bench-monitoring: install  ## false alarms and power of the drift alarm on real pictures, beside Evidently; figures under bench/
	test -x .venv-evidently/bin/python || ( uv venv -q .venv-evidently && VIRTUAL_ENV=.venv-evidently uv pip install -q evidently==0.7.23 'pandas<3' )
	pytest tests/test_bench_monitoring.py -m slow -s

bench-serving: install  ## the endpoint beside plain servers, under load, overload and malformed bodies; figures under bench/
	test -x .venv-openvino/bin/python || ( uv venv -q .venv-openvino && VIRTUAL_ENV=.venv-openvino uv pip install -q openvino==2026.4.1 )
	pytest tests/test_bench_serving.py tests/test_answer.py tests/test_server.py -m 'slow or not slow' -s

image-test: install  ## builds both images with podman and runs them; needs podman, runc and, without a registry, mmdebstrap
	pytest tests/test_images_build.py -m 'slow or not slow' --timeout 3600 -s

lint: install  ## ruff; and nbdev-export, nbdev-clean and make readme would change nothing
	ruff check pipelines tests docs nbs
	ruff format --check pipelines tests docs
	@fresh=$$(mktemp -d) && trap 'rm -rf $$fresh' EXIT && cp -r nbs skin_lesion pyproject.toml README.md settings.ini $$fresh && \
	find $$fresh -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf && \
	( cd $$fresh && nbdev-export && nbdev-clean && jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb > README.md ) && \
	for path in nbs skin_lesion README.md; do diff -r -q -x __pycache__ -x .ipynb_checkpoints $$path $$fresh/$$path || \
	{ echo "Differs: run nbdev-export, nbdev-clean and make readme, and commit."; exit 1; }; done

definitions: install  ## pipelines/definitions from pipelines/
	for name in training experiments search deploy monitoring window notebook_jobs; do skin-lesion compile $$name -o pipelines/definitions/$$name.json; done

lambdas: install  ## zips of the Lambda functions, for terraform apply
	python terraform/lambdas/build.py terraform/build

sbom: install  ## the software bill of materials of the images, CycloneDX, into build/sbom.json
	python pipelines/images/sbom.py build/sbom.json

audit: install  ## known vulnerabilities of what is locked; asks PyPI
	uvx pip-audit==2.9.0 --no-deps --disable-pip -r requirements.lock

leaks: install  ## keys, passwords and tokens in the files of the checkout
	git ls-files -z | xargs -0 uvx --from detect-secrets==1.5.0 detect-secrets-hook --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString

studio: install  ## puts the repository and its wheels where Studio finds them: make studio BUCKET=NAME
	mkdir -p build/studio/wheels && git bundle create -q build/studio/repository.bundle HEAD
	python -m pip download -q -r requirements.lock -d build/studio/wheels
	skin-lesion data upload build/studio --bucket $(BUCKET) --prefix studio

infra-readme: install  ## the tables in terraform/modules/*/README.md
	python terraform/readme.py

diagrams: install  ## the pictures in nbs/guides/architecture.md
	python terraform/diagrams.py

test-infra: install .venv-infra/installed  ## the account: also applies and destroys it on moto, and runs the linters of policies and workflows
	pytest tests/test_terraform.py tests/test_infra_*.py tests/test_workflows.py tests/test_supply_chain.py -m 'slow or not slow' --timeout 1800 -s

.venv-infra/installed:
	uv venv -q .venv-infra
	VIRTUAL_ENV=.venv-infra uv pip install -q checkov==3.3.30 parliament==1.6.4 'setuptools<81' zizmor==1.32.0 jactionlint==2.3.0
	touch $@

readme: install  ## README.md from nbs/index.ipynb
	jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb > README.md

docs: install  ## the documentation site, with search, into site/; opens from the disk
	python docs/build.py

lab: install hooks  ## JupyterLab on the notebooks; step notebooks read what they read in the last run, or in RUN=runs/ID
	SKIN_LESION_RUN=$(abspath $(or $(RUN),$(if $(wildcard runs/latest/steps.json),runs/latest))) jupyter lab --notebook-dir=nbs

# nbdev's drivers are found on the PATH; here they are named whole, so that git works outside of the environment, too
hooks: install  ## git hooks and merge driver that keep notebooks clean, and Jupyter's hook that cleans what it saves
	nbdev-install-hooks
	@if [ -d .git ]; then \
	git config --file .gitconfig merge.jupyternotebook.driver "'$(abspath $(BIN))/nbdev-merge' %O %A %B %P" && \
	git config --file .gitconfig diff.jupyternotebook.command "'$(abspath $(BIN))/nbdev-diff-driver'" && \
	printf '#!/bin/sh\n"%s/nbdev-trust"\n' '$(abspath $(BIN))' > .git/hooks/post-merge; fi

lock:  ## requirements.lock from pyproject.toml; what it holds already stays as it is
	$(COMPILE)

upgrade: install  ## requirements.lock with the newest versions of everything
	$(COMPILE) --upgrade

.PHONY: help install run test notebooks docs lab bench bench-training bench-monitoring lint definitions readme hooks lock upgrade bench-serving bench-quality bench-recipe image-test lambdas studio infra-readme test-infra diagrams sbom audit leaks
.DEFAULT_GOAL := help
