# The README's commands. Everything happens in the clone's own .venv; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo
# One architecture is enough to see that the CUDA code compiles; an installation builds for all (setup.py).
export ODTK_CUDA_ARCH ?= 90

.PHONY: setup test quick lint demo clean
setup: $(VENV)/ready

# torch comes first: then the ranges of the package find it there and pull nothing else.
$(VENV)/ready: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,cuda13]'
	touch $@

test: setup lint
	csrc/check_headers.sh
	$(BIN)/python -m pytest -q

quick: setup
	$(BIN)/python -m pytest -q -x -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build
