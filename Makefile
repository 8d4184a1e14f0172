# make demo         the main job on the embedded models: a verdict, and a picture to look at, demo/figure.png
# make table IMAGES=DIR BUDGETS="0.03" MODELS=full   the paper's experiment on your portraits
# make photo IMAGE=FILE   protects a photo against a tiny autoencoder: photo/comparison.png; TINY=DIR if you have its files
# make app          a page on this machine alone: protect a photo, and see what a stranger would get
# make experiment   the tables of docs/results.md, on the embedded models, under three hours
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

# What `make experiment` compares: each method at the budget at which it is as visible as facelock at 0.06, by LPIPS, on
# validation people (calibration/equal_visibility.py; facelock-wide and facelock-wash by --rms); what is done to the pictures
SIGHTED = noise@0.102 encoder@0.0706 vae@0.0628 cw@0.55 facelock@0.06 facelock-dim@0.1177 facelock-wide@0.2 facelock-wash@0.2 \
	mist@0.055 pid@0.055 editshield@0.0628 blurguard@0.1099 dctshield@0.0628
OF_UNETS = instant@0.1255 photoguard@0.0628 advdm@0.055 sds@0.0863 diffusionguard@0.0706
OF_TOKENS = veto@0.06 decontext@0.06
PURIFIERS = jpeg:90 jpeg:75 resize:0.5 jpeg:75+resize:0.5 palette:32+resize:0.5 blur:5:1.5 rotate:10 noise:8 mirror vae denoise:0.3 restore

# What `make photo` protects against, a hub id or directory of a tiny autoencoder; with: the network that is bundled for
# taef2 and eight iterations, else facelock-wide; and flags like --judge
TINY ?= madebyollin/taef2
PHOTO = --defend_method=$(if $(filter taef2,$(notdir $(TINY))),instant --refine=8,facelock-wide)
TRIP = --model=round-trip --vae="$(TINY)" --recognizer dlib
PANEL ?=
MINI = $(RUN) experiment.py --models=mini --budgets 0.06
COMPARE = $(RUN) experiment.py --models=mini --image_dir=$(EXPERIMENT)/portraits --batch_size=10 --prompts=0,13 --rms=0.065 --purify $(PURIFIERS)

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

# Ten portraits that nothing else uses, two instructions, either bundled editor attacked and asked: under three hours
experiment: $(VENV)/installed-dev
	$(RUN) mini/portraits.py --write $(EXPERIMENT)/portraits --first 1010200 --count 10
	$(COMPARE) --output_dir=$(EXPERIMENT)/instruct-pix2pix --methods $(SIGHTED) $(OF_UNETS) --edit_models instruct-pix2pix flux-kontext
	$(COMPARE) --output_dir=$(EXPERIMENT)/flux-kontext --model=flux-kontext --methods $(SIGHTED) $(OF_TOKENS) \
		--edit_models flux-kontext instruct-pix2pix

app: $(VENV)/installed-app
	$(RUN) app.py --models=$(MODELS)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m ""

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf demo photo
