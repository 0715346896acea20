# Each target sets up what it needs. `make chat` and `make test` are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := . $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml apps/*/pyproject.toml))
PROJECTS := $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
STAMP := $(VENV)/.installed

.PHONY: help setup chat test lint format-native lint-native docs native bench clean

help:
	@echo "make chat    talk with the model that comes with torchchat"
	@echo "make setup   make $(VENV) with core, every plugin and the tested versions"
	@echo "make test    run all tests"
	@echo "make lint    ruff, mypy, and that the generated documents are not stale"
	@echo "make format-native  whether the C++ runner is as clang-format has it"
	@echo "make lint-native    that, and clang-tidy over it"
	@echo "make docs    write the generated documents"
	@echo "make native  build and test the C++ runner, build/native/torchchat-run"
	@echo "make bench   speed beside transformers"
	@echo "make clean   remove $(VENV) and build products"

setup: $(STAMP)

$(STAMP): constraints.txt $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: torchchat needs Python 3.11 or later; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --group lint $(addprefix -e ,$(DISTRIBUTIONS))
	@touch $(STAMP)

chat: $(STAMP)
	@$(BIN)/torchchat chat

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(patsubst %/__init__.py,%,$(wildcard plugins/*/*/__init__.py apps/*/*/__init__.py))
	$(BIN)/python tools/generate_docs.py --check

docs: $(STAMP)
	$(BIN)/python tools/generate_docs.py

# Both runtimes come out of the Python packages; docs/native.md says how to build with others.
native: $(STAMP)
	cmake -S native -B build/native -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTORCHCHAT_TESTS=ON \
	    -DTORCHCHAT_EXECUTORCH=ON -DTORCHCHAT_EXECUTORCH_WHEEL=ON
	cmake --build build/native --parallel
	TORCHCHAT_NATIVE_BUILD=$(CURDIR)/build/native $(BIN)/python -m pytest tests/native

CXX_FILES := $(wildcard native/src/*.* native/src/*/*.* native/tests/*.* native/examples/*.cpp native/include/*/*.h)
# The runtimes' own files are left out: clang-tidy takes minutes in the headers of libtorch.
TIDIED := $(filter-out native/src/backends/%,$(filter native/src/%.cpp native/tests/%.cpp,$(CXX_FILES))) native/src/backends/runtimes.cpp

format-native:
	@command -v clang-format >/dev/null || { echo "error: apt-get install clang-format"; exit 1; }
	clang-format --dry-run --Werror $(CXX_FILES)

# By clang's own tools, on what the tests build with its sanitizers: about five minutes on two cores.
lint-native: $(STAMP) format-native
	@command -v clang-tidy clang++ >/dev/null || { echo "error: apt-get install clang clang-tidy"; exit 1; }
	cmake -S native -B build/native-lint -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_C_COMPILER=clang -DTORCHCHAT_TESTS=ON \
	    -DTORCHCHAT_AOTI=OFF -DTORCHCHAT_FUZZ=ON -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON
	printf '%s\n' $(TIDIED) | xargs -P 2 -n 1 timeout 300 clang-tidy --quiet -p build/native-lint

bench: $(STAMP)
	$(BIN)/python tools/compare_transformers.py

clean:
	rm -rf $(VENV) build dist *.egg-info plugins/*/build plugins/*/*.egg-info apps/*/build apps/*/*.egg-info .mypy_cache .ruff_cache .pytest_cache
