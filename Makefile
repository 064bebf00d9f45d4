# `make demo` and `make test` each work as the first command on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-fast test-all gpu lint docs bench clean

install: $(VENV)/.installed

# torch comes first and pinned, so that no other requirement pulls a newer and larger build.
# C++ is compiled at first use; a machine without a compiler gets pip's.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@{ command -v g++ || command -v clang++ || command -v c++; } > /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compiler]'
	touch $@

demo: install
	$(BIN)/castalia demo

# Two workers, each of which takes whole files, so that what a file makes for its tests is made once.
# The tests start many programs: Python keeps what it compiled for the next, also where an image's
# environment says otherwise.
test: install
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

# The inner loop: tests that start no process and train nothing, and took little time when they were
# recorded; see tests/fixtures/durations.py.
test-fast: install
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --fast -n 2 --dist loadfile --no-loadscope-reorder

test-all: install
	$(BIN)/python -m pytest -m '(slow or not slow) and not gpu'

# The first command on a machine with a GPU: what the pretended GPU of `make test` shows, on a real
# one, and the speeds. Under ten minutes on one H200.
gpu: install
	$(BIN)/python -m pytest tests/gpu -m gpu --durations=10
	$(BIN)/python benchmarks/training.py --gpu --quick --shapes 160m
	$(BIN)/python benchmarks/inference.py --gpu --sizes 160m --rounds 3
	$(BIN)/python benchmarks/distributed.py --gpu --quick

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every generated page of docs/. After a merge conflict in one of them: this, then `git add docs`.
docs: install
	$(BIN)/python -m castalia.pages docs

bench: install
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/mixing_cost.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/mup_transfer.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/eval.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
