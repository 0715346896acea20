# Each target sets up what it needs. `make chat` and `make test` are all that a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := . $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml apps/*/pyproject.toml))
PROJECTS := $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
STAMP := $(VENV)/.installed

CHAT_STAMP := $(VENV)/.installed-for-chat
CHAT_DISTRIBUTIONS := . plugins/tc_eager plugins/tc_gguf
# setuptools warns about every editable installation, which is what a checkout is for.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip

.PHONY: help setup setup-clients chat test test-all lint format-native lint-native docs native test-native bench clean

help:
	@echo "make chat           chat with the model that comes with torchchat"
	@echo "make setup          install core, every plugin and the tested versions into $(VENV)"
	@echo "make setup-clients  install the client libraries that tests/clients drives, into .venv-clients"
	@echo "make test           run all tests"
	@echo "make test-all       run them with the client libraries too"
	@echo "make lint           run ruff and mypy, and check that the generated documents are up to date"
	@echo "make docs           write the generated documents"
	@echo "make native         build the C++ runner, build/native/torchchat-run"
	@echo "make test-native    build it with and without sanitizers, and run its tests"
	@echo "make format-native  check the format of the C++ runner with clang-format"
	@echo "make lint-native    check the format, and run clang-tidy"
	@echo "make bench          compare the speed with transformers"
	@echo "make clean          remove $(VENV) and everything that was built"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: torchchat needs Python 3.11 or later; try: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

setup: $(STAMP)

# Client libraries that tests/clients drives against the server. Their versions conflict with constraints.txt.
setup-clients: $(patsubst tests/clients/%.txt,.venv-clients/%/.installed,$(wildcard tests/clients/*.txt))

.venv-clients/%/.installed: tests/clients/%.txt
	@echo "installing the client libraries of $< into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(STAMP): constraints.txt $(PROJECTS) | $(VENV)/.created
	@echo "installing torchchat, every plugin and the tools for testing into $(VENV)"
	@$(PIP) install --constraint constraints.txt --group test --group lint $(addprefix -e ,$(DISTRIBUTIONS))
	@touch $(STAMP) $(CHAT_STAMP)

# Only what chatting needs; `make setup` later adds the rest to the same $(VENV).
$(CHAT_STAMP): constraints.txt $(addsuffix /pyproject.toml,$(CHAT_DISTRIBUTIONS)) | $(VENV)/.created
	@echo "installing torchchat-core, tc-eager and tc-gguf into $(VENV)"
	@$(PIP) install --constraint constraints.txt $(addprefix -e ,$(CHAT_DISTRIBUTIONS))
	@touch $(CHAT_STAMP)

chat: $(CHAT_STAMP)
	@$(BIN)/torchchat chat

# The C++ programs that tests run are built first, so that a compiler's time counts against no test.
test: $(STAMP)
	$(BIN)/python tools/build_native.py --tests --if-possible
	$(BIN)/python -m pytest

test-all: setup-clients test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(patsubst %/__init__.py,%,$(wildcard plugins/*/*/__init__.py apps/*/*/__init__.py))
	$(BIN)/python tools/generate_docs.py --check

docs: $(STAMP)
	$(BIN)/python tools/generate_docs.py

# Both runtimes come from the Python packages; docs/native.md says how to build with others.
native: $(STAMP)
	@$(BIN)/python tools/build_native.py

test-native: $(STAMP)
	@$(BIN)/python tools/build_native.py --tests
	$(BIN)/python -m pytest tests/native

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
	rm -rf $(VENV) .venv-clients build dist *.egg-info plugins/*/build plugins/*/*.egg-info apps/*/build apps/*/*.egg-info .mypy_cache .ruff_cache .pytest_cache
