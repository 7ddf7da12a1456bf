# make demo    the whole way on real pairs: shards, training in two processes, evaluation, report
# make check   lint and the fast tests, under three minutes on two cores: for every edit
# make test    all tests
# make lint    ruff and the type checker
# make docs    the site in site/, from docs/
# make graph   draw docs/images/imports.svg again, after an import was added or removed

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
LOSS ?= convse

.PHONY: demo check test lint docs graph

demo: .venv/demo.installed
	$(BIN)/python demo/openmoji.py $(DEMO)/openmoji
	$(BIN)/python demo/weights.py $(DEMO)/weights
	$(BIN)/dist-vse shard jsonl $(DEMO)/openmoji/pairs.jsonl $(DEMO)/shards
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file configs/accelerate/cpu_2proc.yaml \
		-m dist_vse.train configs/demo.yaml loss.name=$(LOSS)
	$(BIN)/dist-vse eval $(DEMO)/$(LOSS) --split test
	$(BIN)/dist-vse report $(DEMO)/$(LOSS)

check: lint
	$(BIN)/pytest -n 2 -m "not slow"

test: .venv/dev.installed
	$(BIN)/pytest -n 2

lint: .venv/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs.installed
	$(BIN)/mkdocs build --strict

graph: .venv/dev.installed
	$(BIN)/python -m tests.support.import_graph docs/images/imports.svg

# One stamp a set of extras; it is made again when the dependencies change.
.venv/%.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
