# Everything runs inside .venv, which the first target that needs it builds.
# `make demo` and `make test` are therefore all that a fresh machine needs.

PYTHON ?= python3
VENV   := .venv
PINS   := constraints.txt

# `make test TORCH=2.14.1` runs under another version of PyTorch, in an environment of its own.
ifdef TORCH
VENV := .venv-$(TORCH)
PINS := $(VENV)/constraints.txt
endif

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
PIP    := $(BIN)/pip --disable-pip-version-check install -q -c $(PINS)

.PHONY: demo test test-rest test-all versions check bench bench-gradients bench-recurrent bench-shapes bench-loops bench-ggn bench-accuracy bench-monitor zoo figures format clean

demo: $(STAMP)
	$(BIN)/unbatch demo

# One thread per worker: two workers with a thread pool each would fight over the cores. Idle workers
# take tests from the end of what others have left, so that tests of one recording stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Every test function and every case once; what the tiers are is in tests/README.md.
test: $(STAMP)
	$(PYTEST) --tier quick

test-rest: $(STAMP)
	$(PYTEST) --tier rest

test-all: $(STAMP)
	$(PYTEST)

# Both tiers, and the page that says which versions of PyTorch were tested with what result.
versions: $(STAMP)
	-$(PYTEST) --tier quick --record
	-$(PYTEST) --tier rest --record
	PYTHONPATH=tests $(BIN)/python -m cases.versions

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy src
	$(BIN)/pytest tests/house/test_imports.py tests/house/test_density.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/structure_cost.py --write
	$(BIN)/python benchmarks/overview.py

bench-gradients: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gradients_cost.py --memory --write
	$(BIN)/python benchmarks/overview.py

bench-recurrent: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recurrent_cost.py --write

bench-shapes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/shapes_cost.py --write

bench-loops: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loops_cost.py --write

bench-ggn: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ggn_cost.py --write
	$(BIN)/python benchmarks/overview.py

bench-accuracy: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ggn_accuracy.py --write
	$(BIN)/python benchmarks/overview.py

bench-monitor: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/monitor_overhead.py --write
	$(BIN)/python benchmarks/overview.py

zoo: $(STAMP)
	$(BIN)/python benchmarks/zoo_table.py
	$(BIN)/python benchmarks/overview.py

figures: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/figures.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Leaves .venv alone; remove it by hand to start from nothing.
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The tools that tests and benchmarks compare with, and what these import. They come without their
# requirements, which include torchvision.
PEERS := backpack-for-pytorch unfoldNd vivit-for-pytorch curvlinops-for-pytorch einconv einops linear_operator \
	opt_einsum opacus laplace-torch asdfghjkl torchmetrics lightning-utilities pytorch-lightning accelerate

# torch comes first, so that nothing else gets to choose its build.
$(STAMP): pyproject.toml $(PINS)
	@echo "Building $(VENV) with the versions of constraints.txt (a minute or two) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(or $(TORCH),2.13.0)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps pytorchcv $(PEERS)
	touch $@

# The pins of an environment for another version of PyTorch, all others as in constraints.txt.
.venv-%/constraints.txt: constraints.txt
	mkdir -p $(@D)
	sed 's/^torch==.*/torch==$*/' $< > $@
