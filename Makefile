# `make demo` and `make test` work from a bare checkout: they make .venv, install what is pinned, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARKS := startup graft coe merge graph kernels adaptvis

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

# All of them run, whatever the one before said; at the end it fails naming those with a figure over its limit.
bench: $(READY)
	@failed=; for name in $(BENCHMARKS); do \
		echo "$$name"; $(BIN)/python benchmarks/$$name.py || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "over a limit, or failed:$$failed" >&2; exit 1; fi

$(READY): pyproject.toml constraints.txt kernels/src/merging/sums.c kernels/src/merging/halves.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[images,train,ray,gguf,models,endpoint,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache
