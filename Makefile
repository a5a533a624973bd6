# make demo: SmolLM2 quantised, exported and answering.   make test: ruff, mypy, pytest.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.specquant
DEV    := $(VENV)/.specquant-dev
MODEL  ?= build/smollm2

.PHONY: demo test lint check install clean

demo: $(MODEL)/specquant.json
	$(BIN)/specquant generate $(MODEL) --chat "What is the capital of France?" --max-new-tokens 64 --stats

$(MODEL)/specquant.json: | $(STAMP)
	$(BIN)/specquant-export sample -o $(MODEL)

test: lint check
	$(BIN)/python -m pytest -q

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the import hook of an editable install: it reads a tree of links instead.
check: $(DEV)
	@mkdir -p build/src/specquant
	@for p in exporter runtime custom_ops; do ln -sfn ../../../$$p build/src/specquant/$$p; done
	MYPYPATH=build/src $(BIN)/mypy -p specquant.exporter -p specquant.runtime -p specquant.custom_ops

install: $(DEV)

# Kernel sources are prerequisites: a change of theirs compiles again.
SOURCES := $(wildcard CMakeLists.txt custom_ops/CMakeLists.txt custom_ops/kernels/*/* custom_ops/ort/* custom_ops/tensorrt/*)
PIP     := $(BIN)/python -m pip install --disable-pip-version-check
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --upgrade "pip>=23.1"

$(STAMP): pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(PIP) --progress-bar on -c constraints.txt -e '.[cpu,export]'
	touch $@

# All that the tests use, those of zero-shot tasks, plots and engines included.
$(DEV): pyproject.toml constraints.txt $(SOURCES) | $(BIN)/python
	$(PIP) --progress-bar on -c constraints.txt -e '.[cpu,export,eval,tensorrt-rtx,dev]'
	touch $(STAMP) $@

clean:
	rm -rf build dist $(VENV)
