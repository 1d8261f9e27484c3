# Sets up its own virtual environment; needs Python >= 3.10, git and make.
PYTHON ?= python3
VENV ?= .venv
# The release that the tests run on. PyPI's Linux wheel brings CUDA along; for a CPU-only machine
# point pip at a CPU build, or name another release: make test TORCH=torch==2.6.0
TORCH ?= torch==2.13.0
FRAMEWORKS := $(VENV)/frameworks
# snntorch-ipu's module is called snntorch too: it stands last, and its test alone puts it first.
NEWEST := $(FRAMEWORKS)/spikingjelly-2.0.0:$(FRAMEWORKS)/snntorch-1.0:$(FRAMEWORKS)/snntorch-ipu
OLDER := $(FRAMEWORKS)/spikingjelly-0.0.0.0.14:$(FRAMEWORKS)/snntorch-0.9
OLDEST := $(FRAMEWORKS)/spikingjelly-0.0.0.0.12
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One process a core, each with one thread of torch's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: demo test test-all lint types bench bench-long conformance clean

demo: $(VENV)/.installed  ## the main job: checkpoint -> lynxi-sim -> 10,000 test images
	$(BIN)/python examples/deploy_fashion_mnist.py

test: $(VENV)/.tested  ## the everyday suite, then what depends on the frameworks' older releases
	PYTHONPATH=$(NEWEST) $(PYTEST) -m "not slow"
	PYTHONPATH=$(OLDER) $(PYTEST) -m "(spikingjelly or snntorch) and not slow"
	PYTHONPATH=$(OLDEST) $(PYTEST) -m "spikingjelly and not slow"

test-all: $(VENV)/.tested  ## the slow tests too
	PYTHONPATH=$(NEWEST) $(PYTEST)
	PYTHONPATH=$(OLDER) $(PYTEST) -m "spikingjelly or snntorch"
	PYTHONPATH=$(OLDEST) $(PYTEST) -m spikingjelly

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked against the installed package, where the three folders are one namespace.
types: $(VENV)/.tested
	rm -rf build/typed
	$(PIP) --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) \
		-p spikeport.converters -p spikeport.targets -p spikeport.deploy

bench: $(VENV)/.tested  ## the numbers of the README that take minutes on a CPU
	PYTHONPATH=$(NEWEST) $(BIN)/python benchmarks/deployment.py
	PYTHONPATH=$(NEWEST) $(BIN)/python benchmarks/rerolling.py
	PYTHONPATH=$(NEWEST) $(BIN)/python benchmarks/streaming.py
	PYTHONPATH=$(NEWEST) $(BIN)/python benchmarks/ipu.py replication speed

bench-long: $(VENV)/.tested  ## those that take an hour: 3690 gradients, two trainings of ten epochs
	PYTHONPATH=$(NEWEST) $(BIN)/python benchmarks/ipu.py surrogates training deployment

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	touch $@

# Thousands of cells; the releases of a framework one at a time, CUDA kernels interpreted on the CPU.
CONFORMANCE := TRITON_INTERPRET=1 $(BIN)/python benchmarks/conformance.py --keep build/conformance.json
NEURONS := TRITON_INTERPRET=1 $(BIN)/python benchmarks/conformance.py --keep build/conformance_neurons.json \
	--source spikingjelly-others
conformance: $(VENV)/.tested  ## every source's neurons on every target, spike for spike
	mkdir -p build
	PYTHONPATH=$(NEWEST) $(CONFORMANCE) --source spikingjelly snntorch snntorch-recurrent native nir \
		> build/conformance.txt
	PYTHONPATH=$(OLDEST) $(CONFORMANCE) --source spikingjelly > build/conformance.txt
	PYTHONPATH=$(OLDER) $(CONFORMANCE) --source spikingjelly snntorch snntorch-recurrent > build/conformance.txt
	for path in $(NEWEST) $(OLDER) $(OLDEST); do \
		PYTHONPATH=$$path $(NEURONS) > build/conformance_neurons.txt || exit 1; done
	cat build/conformance.txt build/conformance_neurons.txt

# The frameworks are needed by tests and benchmarks alone, and bring CUDA builds unless kept from it.
# Release 2.0.0 needs Python 3.11: on 3.10 its tests are left out, those of 0.0.0.0.14 run.
$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e ".[test,dev]" loguru scipy matplotlib requests
	$(PIP) --no-deps --target $(FRAMEWORKS)/spikingjelly-0.0.0.0.12 spikingjelly==0.0.0.0.12
	$(PIP) --no-deps --target $(FRAMEWORKS)/spikingjelly-0.0.0.0.14 spikingjelly==0.0.0.0.14
	$(PIP) --no-deps --target $(FRAMEWORKS)/snntorch-1.0 "snntorch==1.0.*"
	$(PIP) --no-deps --target $(FRAMEWORKS)/snntorch-0.9 "snntorch==0.9.*"
	$(PIP) --no-deps --target $(FRAMEWORKS)/snntorch-ipu snntorch-ipu==0.5.18
	if $(BIN)/python -c "import sys; sys.exit(sys.version_info < (3, 11))"; then \
		$(PIP) --no-deps --target $(FRAMEWORKS)/spikingjelly-2.0.0 spikingjelly==2.0.0; fi
	touch $@

clean:
	rm -rf $(VENV) build
