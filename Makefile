# make demo: set up, forge and localize the sample photos, a short kernel benchmark
# make test: the same set-up, then the quick tests against the installed package, in a process for each core;
#            options of pytest go into PYTEST_ARGS, -n 0 for one process
# make test-all: also the tiers `slow` and `build` (make slow) and the documents: everything that runs without a GPU
# make docs: the guides and the API reference as HTML; a warning is an error
# make lint: ruff, mypy, clang-format, hadolint, the pre-commit configuration
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --root-user-action=ignore --disable-pip-version-check -c constraints.txt
STEP := tools/step.sh
CORES := $(shell nproc 2>/dev/null || echo 1)
SOURCES := $(shell find csrc frd_kernels frd_model build_backend -type f ! -name '*.so' ! -name '*.pyc') \
           CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cc')

.PHONY: demo test test-all slow docs lint setup clean

demo: setup
	@$(STEP) "demo" $(BIN)/python examples/demo.py --out demo_out

PYTEST = env FRD_TEST_INSTALLED=1 $(BIN)/pytest -q -n $(CORES) --dist worksteal --durations=20

test: setup
	@$(STEP) "tests" $(PYTEST) $(PYTEST_ARGS)

test-all: test slow docs

slow: setup
	@$(STEP) "tests of the tiers slow and build" $(PYTEST) -m "(slow or build) and not (exhaustive or gpu or sanitize)" $(PYTEST_ARGS)

docs: setup $(VENV)/docs.stamp
	@$(STEP) "documentation" $(BIN)/sphinx-build -q -W --keep-going docs docs/_build

lint: $(VENV)/lint.stamp
	@$(STEP) "ruff check" $(BIN)/ruff check .
	@$(STEP) "ruff format" $(BIN)/ruff format --check .
	@$(STEP) "mypy" $(BIN)/mypy
	@$(STEP) "clang-format" $(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	@$(STEP) "hadolint" $(BIN)/hadolint Dockerfile
	@$(STEP) "pre-commit configuration" $(BIN)/pre-commit validate-config

setup: $(VENV)/install.stamp

$(VENV)/venv.stamp:
	@$(STEP) "check for Python 3.10 to 3.13" $(PYTHON) tools/check_python.py
	@$(STEP) "create .venv" $(PYTHON) -m venv $(VENV)
	@touch $@

# The tools that build come first, so that the build needs no isolated environment of its own.
$(VENV)/dependencies.stamp: constraints.txt pyproject.toml | $(VENV)/venv.stamp
	@$(STEP) "install torch and the build tools" $(PIP) torch setuptools cmake ninja pybind11
	@$(STEP) "install the dependencies" $(PIP) $$($(BIN)/python tools/dependencies.py demo test)
	@touch $@

$(VENV)/install.stamp: $(SOURCES) | $(VENV)/dependencies.stamp
	@$(STEP) "build and install frd_kernels" $(PIP) --no-deps --force-reinstall .
	@touch $@

$(VENV)/lint.stamp: constraints.txt pyproject.toml | $(VENV)/dependencies.stamp
	@$(STEP) "install the linters" $(PIP) $$($(BIN)/python tools/dependencies.py dev)
	@touch $@

$(VENV)/docs.stamp: constraints.txt pyproject.toml | $(VENV)/dependencies.stamp
	@$(STEP) "install Sphinx" $(PIP) $$($(BIN)/python tools/dependencies.py docs)
	@touch $@

clean:
	rm -rf $(VENV) build demo_out *.egg-info frd_kernels/*.so
