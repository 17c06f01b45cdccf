# Octavo: `make run` answers a prompt on a fresh machine, `make test` runs the tests. Needs Python 3.11, a C++20 compiler
# and an index of Python packages. PyPI's torch for Linux carries CUDA; for the small CPU build, where it is reachable:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
PROMPT ?= Name three primary colors.
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 3600

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --build-constraint constraints.txt
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)
PY_FILES := $(shell find src -name '*.py' -o -name '*.pyi')
EXTRA = $(BIN)/python -c 'import sys, tomllib; \
    print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]))'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install run test test-slow test-gpu test-clients fuzz wheel test-wheel lint format clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-12s %s\n", $$1, $$2 }'

# Stamps in $(VENV) record what is installed. Each is remade when a file it was made from has changed.
$(VENV)/.pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	@touch $@

$(VENV)/.install: $(VENV)/.pip pyproject.toml CMakeLists.txt $(CXX_FILES)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.install
	$(EXTRA) $* > $(VENV)/$*.txt
	$(PIP_INSTALL) --requirement $(VENV)/$*.txt
	@touch $@

install: $(VENV)/.install ## Install Octavo into .venv, editable

run: $(VENV)/.install ## Fetch MODEL (smollm2) and answer PROMPT
	@$(BIN)/octavo pull $(MODEL) > /dev/null
	@$(BIN)/octavo run --model $(MODEL) "$(PROMPT)"

test: $(VENV)/.test ## Run the tests, but for the slow ones and those that need a GPU
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.test ## Run the slow tests; they re-make the oracle files
	$(BIN)/python -m pytest -m slow --timeout 7200 $(PYTEST_ARGS)

test-gpu: $(VENV)/.test ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# What users bring along, in an environment of its own: 1 GB, and Node's only where there is npm.
build/clients/.installed: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	cp tests/clients/package.json build/clients
	if command -v npm > /dev/null; then npm install --silent --prefix build/clients; fi
	@touch $@

test-clients: $(VENV)/.test build/clients/.installed ## Try clients that others wrote: Node, LangChain, LlamaIndex, lm-eval
	$(BIN)/python -m pytest -m slow --timeout 7200 tests/clients $(PYTEST_ARGS)

fuzz: $(VENV)/.test ## Try random input from strangers for FUZZ_SECONDS (an hour)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

$(VENV)/.wheel: $(VENV)/.pip pyproject.toml
	$(EXTRA) wheel > $(VENV)/wheel.txt
	$(PIP_INSTALL) --requirement $(VENV)/wheel.txt
	@touch $@

# The wheel is built from the sdist, so that both hold all that is needed. auditwheel refuses one that needs a newer glibc.
# Times in archives are the last commit's: the same sources give the same bytes.
dist/.wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2> /dev/null || date +%s)
dist/.wheel: $(VENV)/.wheel CMakeLists.txt README.md LICENSE $(CXX_FILES) $(PY_FILES)
	rm -rf dist build/dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir build/dist \
	    --config-setting cmake.define.OCTAVO_MANYLINUX=ON .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) \
	    --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	@touch $@

wheel: dist/.wheel ## Make a wheel for any Linux with glibc 2.28 and Python 3.11 or later, and an sdist
	@ls dist/*

test-wheel: dist/.wheel ## Try the wheel in an environment without a compiler; compare with .venv's Octavo if there is one
	$(PYTHON) -I tests/wheel/try_wheel.py dist/*.whl $(if $(wildcard $(VENV)/.install),--compare-with $(BIN)/python)

# With what the tests need, since types are checked against the libraries that they bring.
lint: $(VENV)/.lint $(VENV)/.test ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint ## Put the sources into the project's style
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## Remove the environment, build output and caches; models stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
