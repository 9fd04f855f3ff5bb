# `make demo` and `make test` set up .venv by themselves. `make` lists all targets.

PYTHON    ?= python3
# Options for every pip install, such as another index. PyTorch has an index with builds without CUDA (see its
# installation page). They are gigabytes smaller; use them without a GPU.
PIP_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt $(PIP_FLAGS)

CUDA := .venv-cuda/bin/python

.PHONY: help demo test test-fast test-cuda test-marked-gpu lint docs format clean

help:
	@echo "make demo    set up and run the demo model with policies/demo.toml"
	@echo "make test    set up and run ruff, mypy and pytest"
	@echo "make test-fast  tests that are not marked slow, without ruff and mypy; about a minute on two cores"
	@echo "make test-cuda  set up torch's CUDA build (2.5 GB) and test the GPU code on a simulated GPU"
	@echo "make lint    ruff and mypy only"
	@echo "make docs    the documentation site, in build/site; fails for a broken link"
	@echo "make format  rewrite code with ruff"
	@echo "make clean   remove .venv, builds and caches"
	@echo "PYTHON=python3.12 chooses the interpreter, PIP_FLAGS=... adds options to pip install."

demo: .venv/.installed-run
	$(BIN)/python -m flexgen.bench --policy policies/demo.toml

# One process per core, so each uses one thread. Each process begins with its own files, because models and reference
# results are made once per process. A process that has finished takes tests from the others.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

# Unit tests of every package, to run while you change code. tests/conftest.py lists the slow files. The empty variable
# lets Python keep compiled test files: to compile them takes each process some seconds.
test-fast: .venv/.installed-test
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 8 --dist worksteal

# On a simulated GPU, without a GPU or a driver: the tests marked gpu, with correct numbers, and then tests/fakecuda. Most
# of the latter count launches, waits and bytes, and need no numbers.
test-cuda: test-marked-gpu
	OMP_NUM_THREADS=1 $(CUDA) tests/fakecuda/run.py -m pytest -q tests/fakecuda --numprocesses auto --maxprocesses 8 \
	    --dist worksteal

test-marked-gpu: .venv-cuda/.installed
	OMP_NUM_THREADS=1 $(CUDA) tests/fakecuda/run.py -m pytest -q -p simulated.plugin -m gpu --ignore tests/fakecuda \
	    --numprocesses auto --maxprocesses 8 --dist worksteal

lint: .venv/.installed-test
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache
	$(BIN)/mypy flexgen

# The pages are linked into one folder, where their relative links lead to the same files as in the repository.
# mkdocs is not run with --quiet: then --strict would count no warnings.
SITE := build/site-source

docs: .venv/.installed-test
	mkdir -p $(SITE)
	ln -sfn ../../docs $(SITE)/docs
	for page in README CONTRIBUTING CHANGELOG; do ln -sfn ../../$$page.md $(SITE)/$$page.md; done
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

format: .venv/.installed-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-cuda build dist *.egg-info flexgen/kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last, so an interrupted set-up is repeated.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "flexgen needs Python 3.11 or later: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# Sources of the extension.
KERNELS := $(wildcard flexgen/kernels/cpp/*)

.venv/.installed-run: setup.py constraints.txt $(KERNELS) | .venv/.created
	$(PIP) --editable .
	touch $@

.venv/.installed-test: setup.py constraints.txt $(KERNELS) | .venv/.created
	$(PIP) --editable '.[test,docs]'
	touch $@ .venv/.installed-run

.venv-cuda/.created:
	$(PYTHON) -m venv .venv-cuda
	touch $@

.venv-cuda/.installed: setup.py constraints-cuda.txt $(KERNELS) | .venv-cuda/.created
	$(CUDA) -m pip install --constraint constraints-cuda.txt $(PIP_FLAGS) --editable '.[test]'
	touch $@
