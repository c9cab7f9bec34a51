# Every target does all of its set-up: a virtual environment of its own, pinned by constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := build/typecheck

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format clean

demo: $(STAMP)  ## the tracks on the synthetic set, with the model that comes with the package; and a page of the results
	$(BIN)/lm_eval run --model medvlm-tiny --tasks 'demo_cxr_*' --batch_size 64 --output_path out
	$(BIN)/medvlm report out -o out/report.html

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && $(BIN)/pip install --quiet --no-deps --target $(TYPES) .
	cd build && MYPYPATH=typecheck ../$(BIN)/mypy --config-file ../pyproject.toml -p medvlm_harness

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# setuptools is installed first and the build is not isolated, so that the pinned one builds the package. radgraph is
# there for its scoring file, which tests compare ours with.
$(STAMP): pyproject.toml setup.py constraints.txt medvlm_harness.pth
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target $(VENV)/compared --upgrade radgraph
	touch $(STAMP)
