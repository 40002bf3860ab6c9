PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench docs lint format

# A small planning budget, little data and few episodes, so that it ends within minutes; then a picture, where
# rendering works. One thread a process.
demo: export OMP_NUM_THREADS = 1
demo: .venv/.installed  ## the main job on a shipped teacher, in a small form
	$(BIN)/tdmpc2 accelerate task=cartpole-swingup checkpoint=pretrained/cartpole-swingup out=accelerated/demo \
		planner.num_samples=64 planner.num_elites=16 planner.iterations=3 rounds=1 round_updates=30 data.episodes=3 \
		data.round_episodes=2 distillation.architecture=two_tower distillation.updates=70 \
		evaluation.num_envs=1 evaluation.horizons=[6,24] evaluation.calibration_episodes=2 evaluation.episodes=2 \
		evaluation.label_episodes=0 evaluation.latency_steps=20 evaluation.min_return_pushed=0
	-@$(BIN)/tdmpc2 play accelerated/demo steps=50 out=accelerated/demo/play.gif

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

bench: .venv/.installed
	$(BIN)/python research/bench.py

docs: .venv-docs/.installed  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/.installed: requirements.txt requirements-no-deps.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 15) or sys.exit(\
		'Python 3.11 to 3.14 is needed, and $(PYTHON) is %d.%d: make PYTHON=python3.12 demo' % v)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-no-deps.txt -e .
	touch $@

# The site reads the sources and imports nothing, so it needs no PyTorch.
.venv-docs/.installed: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r requirements-docs.txt
	touch $@
