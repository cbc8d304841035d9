# The verbs: make demo, make test, make style, make bench. Each makes its virtual environment first.
# "make bench" compares with FAISS, vector-quantize-pytorch, transformers, regex, tiktoken and tokenizers, and whole tokenizers
# with PEER=file.py; see benchmarks/encode.py for what that file has to offer. Codecs are compared with transformers and snac,
# WavTokenizer with AUDIO_PEER=file.py (benchmarks/audio.py), Cosmos and VidTok with VIDEO_PEER=file.py (benchmarks/clips.py).
# Its reports go to OUT; REPORTS=kernels/benchmarks replaces ours.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Plain "pip install torch" brings several GB of CUDA libraries; TORCH can name a lighter build, such as
# TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu".
TORCH ?=
OUT ?= out
CODECS ?= encodec_24khz.meta encodec_48khz.meta dac_16khz.descript dac_24khz.descript dac_44khz.descript mimi.kyutai \
	snac_24khz.siuzdak snac_32khz.siuzdak snac_44khz.siuzdak wavtokenizer_small_320.libritts wavtokenizer_large_600.unify
CLIPS ?= cosmos_dv8x8x8.v0_1 vidtok_causal_488_262144.v1_0
REPORTS ?= $(OUT)

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

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --editable ".[bench]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tokenzoo demo --out $(OUT)

test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	./.ci/typecheck $(BIN)/python

bench: $(VENV)/.installed-bench
	mkdir -p $(REPORTS)
	$(BIN)/python kernels/benchmarks/lookup.py --out $(REPORTS)/report.json
	$(BIN)/python kernels/benchmarks/relatives.py --out $(REPORTS)/relatives.json
	$(BIN)/python kernels/benchmarks/exactness.py --out $(REPORTS)/exactness.json
	$(BIN)/python kernels/benchmarks/plot.py --report $(REPORTS)/report.json --out $(REPORTS)/lookup.svg
	$(BIN)/python benchmarks/text.py --json $(REPORTS)/text.json
	$(BIN)/python benchmarks/words.py --json $(REPORTS)/words.json
	$(BIN)/python benchmarks/video.py --out $(REPORTS)/video.json
	$(BIN)/python benchmarks/encode.py one_d_piece_s.in1k_256 titok_b64.in1k $(if $(PEER),--peer $(PEER))
	$(BIN)/python benchmarks/audio.py $(CODECS) --json $(REPORTS)/audio.json $(if $(AUDIO_PEER),--peer $(AUDIO_PEER))
	$(BIN)/python benchmarks/clips.py $(CLIPS) --json $(REPORTS)/clips.json $(if $(VIDEO_PEER),--peer $(VIDEO_PEER))

clean:
	rm -rf $(VENV) build out *.egg-info
