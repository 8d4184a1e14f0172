# make demo         the main job on the embedded models: a verdict, and a picture to look at, demo/figure.png
# make table IMAGES=DIR BUDGETS="0.03" MODELS=full   the paper's experiment on your portraits
# make photo IMAGE=FILE   protects a photo against a tiny autoencoder: photo/comparison.png; TINY=DIR if you have its files
# make app          a page on this machine alone: protect a photo, and see what a stranger would get
# make experiment   the tables of docs/results.md, on the embedded models
# make test         the tests, at most 3 minutes; make test-all adds the slow ones; make lint
# All create .venv and install into it first. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# What `make table` runs on; PROMPTS: numbers of instructions, all if empty (no spaces)
MODELS ?= mini
IMAGES ?= assets/portraits/mini
BUDGETS ?= 0.03
METHODS ?= noise encoder vae cw facelock
PROMPTS ?=
SEED ?= 0
BATCH ?= 8
TABLE ?= table
EXPERIMENT ?= experiment
OURS = facelock-dim@0.11 facelock-wide@0.2 facelock-wash@0.2

# What `make photo` protects with, and against: the recommended method, a hub id or directory of a tiny autoencoder,
# and flags like --judge
PHOTO = --defend_method=facelock-wide --attack_budget=0.2
TINY ?= madebyollin/taef2
TRIP = --model=round-trip --vae="$(TINY)"
PANEL ?=
MINI = $(RUN) experiment.py --models=mini --budgets 0.06

.PHONY: install demo photo app table experiment test test-all lint clean

install: $(VENV)/installed $(VENV)/installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(VENV)/installed-%: requirements-%.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

demo: $(VENV)/installed
	rm -rf demo && mkdir -p demo/portraits && cp assets/portraits/mini/portrait_100000[0-3].png demo/portraits
	$(MINI) --image_dir=demo/portraits --output_dir=demo --methods facelock facelock-dim@0.11 --prompts=0,5,13,19

# photo/comparison.png: the photo, its protection, and what the autoencoder makes of either
photo: $(VENV)/installed
	$(if $(IMAGE),,$(error Which photo? make photo IMAGE=FILE))
	mkdir -p photo
	$(RUN) defend.py "$(IMAGE)" $(TRIP) $(PHOTO) $(PANEL) --output_path=photo/protected.png
	$(RUN) edit.py photo/protected.png --source="$(IMAGE)" $(TRIP) $(PANEL) --output_path=photo/round_trip.png \
		--comparison=photo/comparison.png

table: $(VENV)/installed
	$(RUN) experiment.py --models=$(MODELS) --image_dir="$(IMAGES)" --output_dir="$(TABLE)" --budgets $(BUDGETS) \
		--methods $(METHODS) --seed $(SEED) --batch_size=$(BATCH) $(if $(PROMPTS),--prompts=$(PROMPTS))

# 20 portraits that nothing else uses: the paper's methods and ours with all instructions; ten of them purified, with four
experiment: $(VENV)/installed-dev
	$(RUN) mini/portraits.py --write $(EXPERIMENT)/portraits --first 1010000 --count 20
	$(RUN) mini/portraits.py --write $(EXPERIMENT)/ten --first 1010000 --count 10
	$(MINI) --image_dir=$(EXPERIMENT)/portraits --output_dir=$(EXPERIMENT)/methods --methods $(METHODS) facelock-dim $(OURS)
	$(MINI) --image_dir=$(EXPERIMENT)/ten --output_dir=$(EXPERIMENT)/purification --methods encoder facelock facelock-dim $(OURS) \
		--prompts=0,4,13,19 --purify jpeg:90 jpeg:75 resize:0.5 jpeg:75+resize:0.5

app: $(VENV)/installed-app
	$(RUN) app.py --models=$(MODELS)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q -n 2 --dist worksteal

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m ""

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf demo photo
