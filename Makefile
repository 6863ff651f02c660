# make demo    install what the demo needs, and start it
# make lab     set up, and open the tutorial in JupyterLab
# make run     set up, execute the tutorial on the embedded checkpoint, start the demo
# make test    set up, check the code, run all tests
# make notebook    execute the tutorial and write it as it is committed
# make benchmark   measure speed, memory and fidelity at full size, beside peers; one to two hours
# make quality     measure what each way to be faster costs in quality, on the embedded checkpoint; hours
# make bulk-benchmark    many pictures, and many clients of the server; half an hour
# make soak        kills, many clients, hundreds of pictures, fuzzing at length; an hour
# make reference    the API reference from the docstrings, static pages in docs/reference/html
# make lock    pin all packages with their hashes in requirements.lock (Linux, Python 3.11)
# LOCKED=1 installs what the lock says instead of the newest that requirements.txt allows.
# On Linux without an NVIDIA GPU, PyTorch comes from TORCH_INDEX, its builds for CPUs, which saves gigabytes of CUDA
# libraries. Where that address cannot be reached, or with TORCH_INDEX= , it comes from the ordinary index.
# uv installs in seconds what takes pip minutes. What uv cannot install, such as from an index in pip.conf, pip does.

PYTHON ?= python3
CPU_BUILDS := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi),,$(CPU_BUILDS)))
LOCKED ?=
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV ?= $(BIN)/uv
TRY = if test -x $(UV); then $(UV) pip install --quiet --python $(BIN)/python $(1); else $(PIP) $(1); fi
INSTALL = if $(TRY); then true; else $(PIP) $(1); fi
TORCH := $(shell grep -o "^torch[=>][^ ]*" $(if $(LOCKED),requirements.lock,requirements.txt))

ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: demo lab run notebook test lint clean benchmark quality peers lock soak reference bulk-benchmark

demo: $(VENV)/ready-for-demo
	$(BIN)/ov-decidiffusion demo

lab: $(VENV)/ready
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) decidiffusion.ipynb  # as in a container

run: $(VENV)/ready
	$(BIN)/python execute_notebook.py
	$(BIN)/python -m ov_decidiffusion

notebook: $(VENV)/ready-to-test
	DECIDIFFUSION_TRAIN=1 $(BIN)/python execute_notebook.py --in-place

test: $(VENV)/ready-to-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	echo Linux Windows Darwin | xargs -n 1 -P 2 $(BIN)/basedpyright --pythonpath $(BIN)/python --pythonplatform
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready-to-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

benchmark: $(VENV)/ready-to-test peers
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.waterfall
	$(BIN)/python -m benchmarks.cold
	$(BIN)/python -m benchmarks.parts

quality: $(VENV)/ready-to-test
	$(BIN)/python -m benchmarks.quality

bulk-benchmark: $(VENV)/ready-to-test peers
	$(BIN)/python -m benchmarks.bulk
	$(BIN)/python -m benchmarks.load

soak: $(VENV)/ready-to-test
	$(BIN)/python -m benchmarks.soak

reference: $(VENV)/ready-to-test
	$(BIN)/python -W ignore docs/reference/make.py

peers: $(PEERS)/ready

lock: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet pip-tools
	echo '# What the tests of this version ran with: Linux on x86-64, Python 3.11, PyTorch for CPUs. Made by `make lock`.' > requirements.lock
	$(VENV)-lock/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --no-emit-index-url \
		--no-emit-trusted-host --no-emit-find-links --output-file - $^ >> requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(PEERS) models outputs benchmarks/work docs/reference/html decidiffusion.html

# PyTorch first, and alone: TORCH_INDEX is asked for nothing else.
$(VENV)/torch: requirements.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=/path/to/it"'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a minute or a few the first time."
	@test -x $(UV) || $(PIP) uv || echo "uv cannot be installed: pip does everything."
	@if test -n "$(TORCH_INDEX)" && (export UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=1 PIP_TIMEOUT=15 PIP_RETRIES=1; \
	  export UV_DEFAULT_INDEX="$(TORCH_INDEX)" PIP_INDEX_URL="$(TORCH_INDEX)"; $(call TRY,"$(TORCH)") 2> /dev/null); \
	then touch $@; \
	else test -z "$(TORCH_INDEX)" || echo "$(TORCH_INDEX) cannot be reached: PyTorch comes from the ordinary index."; \
	  $(call INSTALL,"$(TORCH)") && touch $@; fi

$(VENV)/ready-for-demo: $(VENV)/torch pyproject.toml
	$(call INSTALL,--editable ".[demo]")
	touch $@

$(VENV)/ready: $(VENV)/torch requirements.txt
	$(call INSTALL,$(if $(LOCKED),--require-hashes -r requirements.lock,-r requirements.txt))
	$(call INSTALL,--no-deps --editable .)
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready tests/requirements.txt tests/package-lock.json
	$(if $(LOCKED),,$(call INSTALL,-r tests/requirements.txt))
	if command -v npm > /dev/null; then npm ci --prefix tests --no-audit --no-fund --silent; fi  # axe-core, for the demo
	touch $@

# Optimum Intel's requirements clash with ours and with each other, so it is installed apart, in versions seen to work,
# on top of what is installed here already.
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(PEERS)/ready: benchmarks/peers-requirements.txt $(VENV)/ready
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python $(SITE) > $$($(PEERS)/bin/python $(SITE))/below.pth
	$(PEERS)/bin/python -m pip install -q --no-deps -r benchmarks/peers-requirements.txt
	touch $@
