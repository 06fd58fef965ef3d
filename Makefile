# make serve, make quick, make test, make lint, make bench; each creates .venv when it is not there.
# make gpu installs nothing: it takes the Python of .venv if there is one, else $(PYTHON), which must have torch and timm.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: serve quick test lint format bench gpu clean

serve: $(STAMP)
	exec $(BIN)/gpt-serve serve --port $(PORT) --adapters adapters

# The tests start many processes: what Python compiles is kept for the next one, whatever the environment says.
quick test: export PYTHONDONTWRITEBYTECODE :=

quick: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m 'not slow'

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/gpt-serve bench --output benchmarks/results

GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_BENCH := $(addprefix --only ,peers mixed tasks prompts overhead)
GPU_BACKBONE ?= vit_small_patch16_224
GPU_RESULTS ?= build/gpu

gpu:
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(GPU_PYTHON) -m pytest --confcutdir=tests/gpu -p no:cacheprovider -W default -s -v tests/gpu
	$(GPU_PYTHON) -c 'from gpt_serve.cli.main import main; main()' bench $(GPU_BENCH) --backbone $(GPU_BACKBONE) \
	  --device auto --repeats 5 --seconds 3 --output $(GPU_RESULTS)

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "GPT-Serve needs Python 3.11 or newer: set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
