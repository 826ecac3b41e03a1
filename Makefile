# Each of these works from a bare clone: it makes .venv, installs the requirements, and does the job.
#   make demo      pretrain on small real photographs with two processes, in minutes on a CPU
#   make test      the tests, with those of test-gpu where there is a GPU
#   make test-gpu  the checks of what a CPU cannot show
#   make lint      the linter and the formatter's check
#   make clean     remove .venv and the demo's output

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu lint clean

# 1 where torch finds a GPU; asked when a recipe needs it, once torch is installed
GPU = $(shell $(BIN)/python -c 'import torch; print("1" * torch.cuda.is_available())')

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh runs/demo

# one more at a time than there are cores, as many wait for what others do
SIDE_BY_SIDE = -n $$(($$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

test: .venv/installed
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(if $(GPU),$(BIN)/python -m pytest tests/gpu,$(DRY))

# the checks themselves are tested, but for what takes long
DRY = @echo "make test: no GPU here: tests/gpu runs dry, on the CPU" && $(BIN)/python -m pytest tests/gpu --dry -m "not slow"

test-gpu: .venv/installed
	$(if $(GPU),$(BIN)/python -m pytest tests/gpu,$(error torch finds no GPU on this machine))

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs/demo
