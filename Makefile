# Each target makes the environment it needs; `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything an install brings in is pinned, and nothing is asked of the network after it.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
CORES := $(shell nproc 2>/dev/null || echo 2)

# accelerate's own defaults, spelled out so that it does not remark on them.
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
DEMO := demo
BACKBONE := assets/synthetic-backbone
SENTENCE := A woman in a red coat and blue jeans with a black backpack

.PHONY: demo test test-slow soak fidelity bench-data bench-eval hub-check lint format clean pretrain

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@# trackio asks for a Pillow before 13, which what is used of it does not need.
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps trackio
	@touch $@

demo: $(VENV)/.installed
	@rm -rf $(DEMO)/model
	$(BIN)/python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --domain target --seed 0 --output_dir $(DEMO)/data
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(BACKBONE) --dataset synthetic_pedes --data_dir $(DEMO)/data --output_dir $(DEMO)/before
	$(BIN)/accelerate launch $(LAUNCH) --num_cpu_threads_per_process $(CORES) train_eccl.py recipes/demo.yaml --init_from $(BACKBONE) --data_dir $(DEMO)/data --output_dir $(DEMO)/model
	$(BIN)/python -m eccl.search.gallery --model $(DEMO)/model --images $(DEMO)/data/imgs --query "$(SENTENCE)" --output $(DEMO)/search.png
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(DEMO)/model --dataset synthetic_pedes --data_dir $(DEMO)/data --before $(DEMO)/before/results.json --output_dir $(DEMO)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

# Kills training 20 times at random moments and resumes it, with one process and with two: four minutes.
soak: $(VENV)/.installed
	@$(BIN)/python tests/programs/soak.py

# Everything that is compared with the published code, and the worst difference of each.
fidelity: $(VENV)/.installed
	@$(BIN)/python tests/programs/fidelity.py

# Publishes to a Hub on this machine, and loads everything from it by name.
hub-check: $(VENV)/.installed
	@$(BIN)/python tests/programs/hub_check.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Loading and feeding at CUHK-PEDES' size; drawing the set takes four minutes, once.
bench-data: $(VENV)/.installed
	$(BIN)/python -m eccl.dataset_scripts.synthetic --size cuhk --output_dir $(DEMO)/cuhk-size
	$(BIN)/python -m eccl.eval.benchmarks.data --dataset cuhk_pedes --data_dir $(DEMO)/cuhk-size

# The metric beside the matrix product that it rests on.
bench-eval: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.metric

# Makes assets/ anew: half an hour or more on two cores.
pretrain: $(VENV)/.installed
	$(BIN)/python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --domain source --seed 1 --train_ids 6000 --val_ids 200 --test_ids 200 --output_dir $(DEMO)/source
	$(BIN)/accelerate launch $(LAUNCH) --num_cpu_threads_per_process $(CORES) train_eccl.py recipes/pretrain_synthetic.yaml --data_dir $(DEMO)/source --output_dir $(DEMO)/backbone
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(DEMO)/backbone --dataset synthetic_pedes --data_dir $(DEMO)/source --output_dir $(DEMO)/backbone-results

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
