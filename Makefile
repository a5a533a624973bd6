# make demo: SmolLM2 quantised, exported and answering.   make test: ruff, mypy, pytest.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.specquant
MODEL  ?= build/smollm2

.PHONY: demo test lint check install clean

demo: $(MODEL)/specquant.json
	$(BIN)/specquant generate $(MODEL) --chat "What is the capital of France?" --max-new-tokens 64 --stats

$(MODEL)/specquant.json: | $(STAMP)
	$(BIN)/specquant-export sample -o $(MODEL)

test: lint check
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the import hook of an editable install: it reads a tree of links instead.
check: $(STAMP)
	@mkdir -p build/src/specquant
	@for p in exporter runtime custom_ops; do ln -sfn ../../../$$p build/src/specquant/$$p; done
	MYPYPATH=build/src $(BIN)/mypy -p specquant.exporter -p specquant.runtime -p specquant.custom_ops

install: $(STAMP)

# Kernel sources are prerequisites: a change of theirs compiles again.
SOURCES := $(wildcard CMakeLists.txt custom_ops/CMakeLists.txt custom_ops/kernels/*/* custom_ops/ort/*)
$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23.1"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[cpu,export,dev]'
	touch $@

clean:
	rm -rf build dist $(VENV)
