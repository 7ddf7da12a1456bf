# make demo   the whole way on real pairs: shards, training in two processes, evaluation, report
# make test   all tests
# make lint   ruff and the type checker

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
LOSS ?= convse

.PHONY: demo test lint

demo: .venv/demo.installed
	$(BIN)/python demo/openmoji.py $(DEMO)/openmoji
	$(BIN)/python demo/weights.py $(DEMO)/weights
	$(BIN)/dist-vse shard jsonl $(DEMO)/openmoji/pairs.jsonl $(DEMO)/shards
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu_2proc.yaml \
		-m dist_vse.train configs/demo.yaml loss.name=$(LOSS)
	$(BIN)/dist-vse eval $(DEMO)/$(LOSS) --split test
	$(BIN)/dist-vse report $(DEMO)/$(LOSS)

test: .venv/dev.installed
	$(BIN)/pytest -n 2

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One stamp a set of extras; it is made again when the dependencies change.
.venv/%.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
