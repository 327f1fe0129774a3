# Each target makes the environment that it needs: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
TORCH := torch==2.13.0
# constraints.txt pins every package. After the installation nothing is downloaded.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
CORES := $(shell nproc 2>/dev/null || echo 2)
# Many tests wait for a server or for another process. With one process more than cores, the cores are busy meanwhile.
PYTEST := -m pytest -q -n $(shell expr $(CORES) + 1)

# The defaults of accelerate. If they are not given, accelerate prints a warning that lists them.
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
DEMO := demo
BACKBONE := assets/synthetic-backbone
SENTENCE := A woman in a red coat and blue jeans with a black backpack

.PHONY: demo app test test-slow test-oldest test-newest install-oldest install-newest wheel-check soak fidelity common-suite bench-data bench-rows bench-search bench-explanation bench-eval bench compare compare-quick \
	hub-check lint types format clean pretrain

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/$(PIP_INSTALL) --constraint constraints.txt $(TORCH)
	@$(BIN)/$(PIP_INSTALL) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --domain target --seed 0 --output_dir $(DEMO)/data
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(BACKBONE) --dataset synthetic_pedes --data_dir $(DEMO)/data --output_dir $(DEMO)/before --overwrite
	$(BIN)/accelerate launch $(LAUNCH) --num_cpu_threads_per_process $(CORES) train_eccl.py recipes/demo.yaml --overwrite True --init_from $(BACKBONE) --data_dir $(DEMO)/data --output_dir $(DEMO)/model
	rm -rf $(DEMO)/gallery.db
	$(BIN)/python -m eccl.search.gallery index $(DEMO)/data/imgs --pattern "{camera}/*" --model $(DEMO)/model --gallery $(DEMO)/gallery.db
	$(BIN)/python -m eccl.search.gallery search "$(SENTENCE)" --gallery $(DEMO)/gallery.db --output $(DEMO)/search.png
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(DEMO)/model --dataset synthetic_pedes --data_dir $(DEMO)/data --before $(DEMO)/before/results.json --output_dir $(DEMO) --overwrite

# The page over the gallery that `make demo` has made.
app: $(VENV)/.installed
	$(BIN)/python -m eccl.search.app --gallery $(DEMO)/gallery.db

test: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python $(PYTEST) --dist loadgroup -m slow

# The fast tests with the lowest versions that setup.cfg allows. The tests of the search and of random inputs are left out
# here and below: CI has a limit of time, and the lowest versions of the search's packages are the pinned ones.
test-oldest: install-oldest
	$(VENV)-oldest/bin/python $(PYTEST) -m "not slow" --ignore tests/search --ignore tests/test_fuzz.py

install-oldest: $(VENV)-oldest/.torch
	@echo "installing into $(VENV)-oldest"
	@$(PYTHON) tests/programs/lower_bounds.py > $(VENV)-oldest/constraints.txt
	@$(VENV)-oldest/bin/$(PIP_INSTALL) --constraint $(VENV)-oldest/constraints.txt --editable ".[test]" $(TORCH)

# The fast tests with the newest release of everything but torch.
test-newest: install-newest
	$(VENV)-newest/bin/python $(PYTEST) -m "not slow" --ignore tests/search --ignore tests/test_fuzz.py

install-newest: $(VENV)-newest/.torch
	@echo "installing into $(VENV)-newest"
	@$(VENV)-newest/bin/$(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable ".[test]" $(TORCH)

# An environment with torch alone. It needs nothing of the checkout, so it can be made beside another installation.
$(VENV)-oldest/.torch $(VENV)-newest/.torch:
	@echo "installing torch into $(@D)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/$(PIP_INSTALL) $(TORCH)
	@touch $@

# Builds the wheel, installs it into a new environment outside the checkout, and runs its commands there.
wheel-check: $(VENV)/.installed
	@$(BIN)/python tests/programs/wheel_check.py

# Kills training 20 times at random moments and resumes it, with one process and with two: four minutes.
soak: $(VENV)/.installed
	@$(BIN)/python tests/programs/soak.py

# Compares every quantity with the published code and prints the largest difference of each.
fidelity: $(VENV)/.installed
	@$(BIN)/python tests/programs/fidelity.py

# Publishes to a Hub that runs on this machine, and loads everything from it by name.
hub-check: $(VENV)/.installed
	@$(BIN)/python tests/programs/hub_check.py

# Runs transformers' own common tests on ECCL, and on CLIP for comparison; it downloads them.
common-suite: $(VENV)/.installed
	@$(BIN)/python tests/programs/common_suite.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/eccl
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Measures loading and feeding at the size of CUHK-PEDES. Drawing the data set takes four minutes, once.
bench-data: $(VENV)/.installed
	$(BIN)/python -m eccl.dataset_scripts.synthetic --size cuhk --output_dir $(DEMO)/cuhk-size
	$(BIN)/python -m eccl.eval.benchmarks.data --dataset cuhk_pedes --data_dir $(DEMO)/cuhk-size

# Measures the start of a training on a Parquet data set of a million small images, and from a stream: five minutes.
bench-rows: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.data --rows 1000000 --data_dir $(DEMO)/million

# Measures the gallery's store with up to 300,000 rows, embedded: ten minutes.
bench-search: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.search --rows 10000 100000 300000

# Measures how often the heat map points at the right part of drawn persons: four minutes.
bench-explanation: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.explanation --model $(BACKBONE) --images 200

# Compares the time of the metric with that of the matrix product inside it.
bench-eval: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.metric

# Compares training, encoding, memory and start-up with transformers' CLIP and with the matrix rate: twenty minutes on two
# idle cores. On a GPU: python -m eccl.eval.benchmarks.speed --device cuda
bench: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.benchmarks.speed --output_dir $(DEMO)/speed --overwrite

# Trains the backbone in assets/ again, in three runs; its README says why. Two hours on two cores.
PRETRAIN = $(BIN)/accelerate launch $(LAUNCH) --num_cpu_threads_per_process $(CORES) train_eccl.py recipes/pretrain_synthetic.yaml
SOURCE := --layout cuhk_pedes --domain source --train_ids 12000 --val_ids 200 --test_ids 200 --images_per_id 3
FINE := --image_size 192 64 --learning_rate 6e-4 --warmup_epochs 0
pretrain: $(VENV)/.installed
	$(BIN)/python -m eccl.dataset_scripts.synthetic $(SOURCE) --seed 1 --output_dir $(DEMO)/source
	$(BIN)/python -m eccl.dataset_scripts.synthetic $(SOURCE) --seed 2 --nuisance 1.8 --output_dir $(DEMO)/source-hard
	$(PRETRAIN) --data_dir $(DEMO)/source --output_dir $(DEMO)/backbone-coarse
	$(PRETRAIN) --data_dir $(DEMO)/source --output_dir $(DEMO)/backbone-fine --init_from $(DEMO)/backbone-coarse $(FINE) --num_train_epochs 2
	$(PRETRAIN) --data_dir $(DEMO)/source-hard --output_dir $(DEMO)/backbone --init_from $(DEMO)/backbone-fine $(FINE) --num_train_epochs 3
	$(BIN)/python -m eccl.eval.evaluate_eccl --model $(DEMO)/backbone --dataset synthetic_pedes --data_dir $(DEMO)/source --output_dir $(DEMO)/backbone-results --overwrite

# Compares six methods on three drawn benchmarks: under three hours on two cores. A comparison that was stopped continues.
compare: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.compare_methods --output_dir $(DEMO)/comparison

# Shows within five minutes that the comparison works; its figures say nothing about the methods.
compare-quick: $(VENV)/.installed
	$(BIN)/python -m eccl.eval.compare_methods --settings quick --seeds 2 --trials 2 --steps 6 --output_dir $(DEMO)/comparison-quick

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-milvus $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
