# Everything installs into .venv; nothing outside this folder is touched.
#   make demo   serve a real quantized checkpoint, ask it, print answers and the kernel plan
#   make test   the whole test suite
#   make lint   style
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes; each may hold an engine of about 2 GB.
JOBS ?= 2

.PHONY: install demo test lint clean

install: $(STAMP)

$(STAMP): pyproject.toml scripts/install.sh scripts/name_cpu_build.py
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/install.sh
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Files in their order: those with engines come early, so that none is left over for the end.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
