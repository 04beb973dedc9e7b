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

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
