# make run     set up, execute the notebook on the embedded checkpoint, start the demo
# make test    set up, run all tests
# On Linux, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test lint clean

run: $(VENV)/ready
	CI=true $(BIN)/python -m nbconvert --to html --execute decidiffusion.ipynb
	@echo "The executed notebook, with its pictures: $(CURDIR)/decidiffusion.html"
	$(BIN)/python -m ov_decidiffusion

test: $(VENV)/ready-to-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest -q

lint: $(VENV)/ready-to-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) models outputs decidiffusion.html

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=/path/to/it"'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) "$(shell grep '^torch' requirements.txt)")
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@
