# `make demo` and `make test` set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

# The three jobs on a small data set that it makes: prepare, train, test with 10 clips.
demo: $(READY)
	@echo "== prepare: small clips of six motions, re-encoded and indexed like Kinetics"
	$(BIN)/i3d-gn make-motion-clips data/demo/raw
	$(BIN)/i3d-gn resize data/demo/raw data/demo/videos --short-side 80
	$(BIN)/i3d-gn index data/demo/videos/train data/demo/train.parquet
	$(BIN)/i3d-gn index data/demo/videos/val data/demo/val.parquet --label-map data/demo/train.parquet
	@echo "== train and test: group norm, at 2 clips per batch"
	$(BIN)/i3d-gn train configs/demo.yaml
	$(BIN)/i3d-gn evaluate configs/demo.yaml
	@echo "== the same with batch norm"
	$(BIN)/i3d-gn train configs/demo.yaml model.norm=bn output_dir=runs/demo_bn
	$(BIN)/i3d-gn evaluate configs/demo.yaml model.norm=bn output_dir=runs/demo_bn
	@echo "== the same with group norm, but every clip is one frame repeated, without motion"
	$(BIN)/i3d-gn train configs/demo.yaml clip.stride=0 output_dir=runs/demo_one_frame
	$(BIN)/i3d-gn evaluate configs/demo.yaml clip.stride=0 output_dir=runs/demo_one_frame
	@echo "== result"
	$(BIN)/i3d-gn report runs/demo runs/demo_bn runs/demo_one_frame --out runs/demo_curves.png --html runs/demo_report.html

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Two test files at a time, each with one compute thread: what two cores run fastest.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The site, from docs/*.md and docstrings; warnings are errors.
docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf $(VENV) runs build docs/_build *.egg-info
