# `make demo` and `make test` start from nothing: they make .venv first.
PYTHON ?= python3
BIN := .venv/bin
MODEL := examples/demo-model

.PHONY: demo test check wheel-test format clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/prune-cli prune $(MODEL) demo-out --method wanda --sparsity 0.5 --eval builtin --generate 16 --overwrite
	$(BIN)/prune-cli eval demo-out --against $(MODEL) --tasks builtin --add-to-report

test: .venv/ready
	$(BIN)/python -m pytest

check: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Builds the sdist and the wheel and prunes with each, installed outside of this checkout.
wheel-test: .venv/ready
	$(BIN)/python .ci/wheel_test.py

format: .venv/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv demo-out demo-out.partial build *.egg-info
