# `make demo` and `make test` work from a bare checkout: they make .venv, install what is pinned, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint format bench clean

demo: $(READY)
	$(BIN)/surgery demo -o out/demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/graft.py
	$(BIN)/python benchmarks/coe.py
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/graph.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/adaptvis.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[images,train,ray,gguf,models,endpoint,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache
