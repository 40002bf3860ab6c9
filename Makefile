PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint format

demo: .venv/.installed  ## the main job on a shipped teacher
	$(BIN)/python scripts/accelerate.py task=cartpole-swingup checkpoint=pretrained/cartpole-swingup \
		out=accelerated/demo episodes=5 rounds=1 round_episodes=5 round_updates=100 updates=200 num_envs=5 \
		calibration_episodes=3 eval_episodes=3 label_episodes=0 latency_steps=50

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: .venv/.installed
	$(BIN)/python benchmarks/bench.py

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@
