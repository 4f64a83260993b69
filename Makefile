# All paths are relative, so that the checkout may have any name and lie anywhere.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# processes that run the tests; 0 runs them in pytest's own process
TEST_WORKERS ?= 2
# passed on to pytest, for example PYTEST_ARGS="-m slow" or PYTEST_ARGS="tests/test_packaging.py -x"
PYTEST_ARGS ?=
# passed on to the installation of torch, for example to choose another package index
TORCH_PIP_ARGS ?=
DEMO_ARGS ?=
BENCHMARK_ARGS ?=
VERSIONS_ARGS ?=
LMMS_EVAL_ARGS ?=
DEEPSPEED_ARGS ?=
VLLM_ARGS ?=
APP_MODEL ?=
# folder for the pictures of the docs, made from the screenshots
APP_DOCS ?=

.DEFAULT_GOAL := help
.PHONY: help setup test test-versions test-lmms-eval test-deepspeed test-vllm test-app test-sources lint demo benchmark clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

setup: $(STAMP) ## create .venv and install the package with its tested dependencies (once)

# torch comes first, at its exact version: left to the resolver, another build of it may be chosen.
$(STAMP): pyproject.toml constraints.txt
	@echo "[1/3] creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing $$(grep '^torch==' constraints.txt) (the largest download)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	@echo "[3/3] installing llava-next-ar with its tested dependencies (a minute or two)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	@mkdir -p .typing && ln -sfn .. .typing/llava_next_ar
	@touch $(STAMP)
	@echo "done; to use it in this shell: source $(BIN)/activate"

test: setup ## run the tests (PYTEST_ARGS="-m slow" for the slow ones)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-versions: setup ## run the core tests with the oldest and newest releases (VERSIONS_ARGS="--list" names them)
	$(BIN)/python tests/environments/versions_run.py --torch-pip-args "$(TORCH_PIP_ARGS)" $(VERSIONS_ARGS)

test-lmms-eval: setup ## run lmms-eval itself on a tiny model, in an environment of its own (needs a package index)
	$(BIN)/python tests/environments/lmms_eval_run.py $(LMMS_EVAL_ARGS)

test-deepspeed: setup ## train under DeepSpeed ZeRO on the CPU, in an environment of its own (needs a package index)
	$(BIN)/python tests/environments/deepspeed_run.py $(DEEPSPEED_ARGS)

test-vllm: setup ## serve tiny models with vLLM, in an environment of its own (needs a package index)
	$(BIN)/python tests/environments/vllm_run.py --torch-pip-args "$(TORCH_PIP_ARGS)" $(VLLM_ARGS)

test-app: setup ## run the app in Chromium, with screenshots in outputs/app (APP_MODEL=folder shows another model)
	$(BIN)/python -m pip install --quiet "playwright==1.65.2"
	APP_SCREENSHOTS=$(or $(APP_SCREENSHOTS),outputs/app) APP_MODEL=$(APP_MODEL) APP_DOCS=$(APP_DOCS) \
		$(BIN)/python -m pytest -m slow tests/serving/test_app_browser.py $(PYTEST_ARGS)

test-sources: setup ## record clips with the simulators of the extra `sources`, and test them (needs a package index and libegl1)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[sources]"
	$(BIN)/python -m pytest -m "slow or not slow" tests/experiments/test_video_sources.py

lint: setup ## check the style, and that static tools see the package's types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy tests/typed_usage.py

demo: setup ## train a tiny model on synthetic clips and show what it predicts
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

benchmark: setup ## measure decoding, the head and a training step
	$(BIN)/python scripts/benchmark.py $(BENCHMARK_ARGS)

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) .typing build dist *.egg-info demo_output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
