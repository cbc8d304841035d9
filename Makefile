# The verbs: make demo, make test, make style, make bench. Each makes its virtual environment first.
# "make bench" compares with peers that are installed beside (faiss-cpu, vector-quantize-pytorch), and whole tokenizers with
# PEER=file.py; see benchmarks/encode.py for what that file has to offer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Plain "pip install torch" brings several GB of CUDA libraries; TORCH can name a lighter build, such as
# TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu".
TORCH ?=
OUT ?= out

.PHONY: demo test style bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --editable ".[test,style]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tokenzoo demo --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	./.ci/typecheck $(BIN)/python

bench: $(VENV)/.installed-dev
	$(BIN)/python kernels/benchmarks/lookup.py
	$(BIN)/python kernels/benchmarks/relatives.py
	$(BIN)/python benchmarks/encode.py one_d_piece_s.in1k_256 titok_b64.in1k $(if $(PEER),--peer $(PEER))

clean:
	rm -rf $(VENV) build out *.egg-info
