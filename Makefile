# One word per habit: `make help` lists them. Needs Python 3.10 or newer (3.11 for the pinned set), make and git.

PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
OUT ?= demo-out
SECONDS ?= 600
# Two processes, each a file at a time: much of what the tests do is waiting for processes and servers of their own.
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS := $(VENV)/pytest.xml
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Code in the documents is laid out by hand, to be read beside its comments.

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types bench bench-peers soak fuzz clean

help: ## list these words
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY) ## create .venv and install the package in it; done once, again when the pins change

demo: setup ## train from a real S3 server, kill, resume, survive a bad shard
	@$(BIN)/python examples/demo.py --out $(OUT)

test: lint types ## everything a change must pass
	@$(BIN)/python -m pytest --junitxml=$(RESULTS) $(PYTEST_ARGS)
	@$(BIN)/python -c "$$SUMMARY" $(RESULTS)

lint: setup ## ruff: rules and format
	@$(BIN)/python -m ruff check --quiet .
	@$(BIN)/python -m ruff format --check --quiet . || { $(BIN)/python -m ruff format --check . >&2; exit 1; }
	@echo "make lint: ruff found nothing"

types: setup ## mypy, strict
	@$(BIN)/python -m mypy

bench: setup ## measure, side by side with pure zstd decoding
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-peers: setup $(PEERS)/common/.ready $(PEERS)/mosaicml/.ready ## measure beside other loaders, each in a pinned environment
	@$(BIN)/python benchmarks/compare.py --environments $(PEERS) $(BENCH_ARGS)

soak: setup ## kill and resize real trainers; then 10 minutes of faults, kills and a full disk; every sample is checked
	@$(BIN)/python -m tests.soak --chains 30 --seconds 180
	@$(BIN)/python -m tests.soak faults --seconds 600

fuzz: setup ## feed mutated shards, indexes, cache entries, foreign files and states to the readers, 10 minutes (SECONDS=)
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

clean: ## remove everything these words made
	rm -rf $(VENV) $(PEERS) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted setup is done again, a finished one costs nothing.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "make setup: there is no '$(PYTHON)' here; name another: PYTHON=python3.12 make setup" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make setup: needs Python 3.10 or newer, $(PYTHON) is `$(PYTHON) -V`; name another: PYTHON=python3.12 make setup" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make setup: $(PYTHON) comes without venv; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "make setup: installing into $(VENV) (torch is large: this takes minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev,demo]"
	@touch $@
	@echo "make setup: $(VENV) is ready, `$(BIN)/python -V`, torch `$(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))'`"

$(PEERS)/%/.ready: benchmarks/peers/requirements/%.txt
	@echo "make bench-peers: installing the peers into $(PEERS)/$* (minutes, once)"
	@$(PYTHON) -m venv $(PEERS)/$*
	@$(PEERS)/$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

# Reached only when ruff, mypy and pytest were all content; the numbers are pytest's own.
define SUMMARY
import sys, xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot().find("testsuite").attrib
skipped = int(suite["skipped"])
print(
    f"make test: all checks passed: ruff, mypy and {int(suite['tests']) - skipped:,} tests"
    f" ({skipped:,} skipped) in {float(suite['time']):,.0f} s"
)
endef
export SUMMARY
