# make demo   the main job on the embedded models, and a picture to look at: demo/figure.png
# make test   the tests, at most 5 minutes; make test-all adds the slow ones
# Both create .venv and install into it first. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# The demo's portraits, instructions and budget
DEMO ?= demo
DEMO_PORTRAITS ?= portrait_1000000 portrait_1000001 portrait_1000002 portrait_1000003
DEMO_PROMPTS ?= 0,5,13,19
DEMO_BUDGET ?= 0.06

.PHONY: install demo test test-all lint clean

install: $(VENV)/installed $(VENV)/installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Public scripts only: what stands here can be typed by hand.
demo: $(VENV)/installed
	rm -rf $(DEMO)/portraits $(DEMO)/protected $(DEMO)/edits
	mkdir -p $(DEMO)/portraits
	cp $(DEMO_PORTRAITS:%=assets/portraits/mini/%.png) $(DEMO)/portraits/
	$(RUN) main_defend.py --models=mini --image_dir=$(DEMO)/portraits --output_dir=$(DEMO)/protected \
		--defend_method=facelock --attack_budget=$(DEMO_BUDGET)
	$(RUN) main_edit.py --models=mini --src_dir=$(DEMO)/portraits --edit_dir=$(DEMO)/edits/clean \
		--seed=0 --prompts=$(DEMO_PROMPTS) --batch_size=8
	$(RUN) main_edit.py --models=mini --src_dir=$(DEMO)/protected/budget_$(DEMO_BUDGET) \
		--edit_dir=$(DEMO)/edits/facelock --seed=0 --prompts=$(DEMO_PROMPTS) --batch_size=8
	$(RUN) evaluation/eval_psnr.py --clean_edit_dir=$(DEMO)/edits/clean \
		--defend_edit_dirs $(DEMO)/edits/facelock --seed=0 --output=$(DEMO)/psnr_metric.csv
	$(RUN) evaluation/eval_facial.py --models=mini --src_dir=$(DEMO)/portraits --clean_edit_dir=$(DEMO)/edits/clean \
		--defend_edit_dirs $(DEMO)/edits/facelock --seed=0 --output=$(DEMO)/facial_metric.csv
	$(RUN) evaluation/eval_facial.py --models=mini --by=judge --src_dir=$(DEMO)/portraits \
		--clean_edit_dir=$(DEMO)/edits/clean --defend_edit_dirs $(DEMO)/edits/facelock --seed=0 \
		--output=$(DEMO)/facial_judge_metric.csv
	$(RUN) evaluation/figure.py --src_dir=$(DEMO)/portraits --protected_dirs $(DEMO)/protected/budget_$(DEMO_BUDGET) \
		--clean_edit_dir=$(DEMO)/edits/clean --defend_edit_dirs $(DEMO)/edits/facelock --seed=0 \
		--names $(wordlist 1,2,$(DEMO_PORTRAITS)) --output=$(DEMO)/figure.png
	@echo "Look at $(DEMO)/figure.png. The mini models are a stand-in: this says nothing about real photos."

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m ""

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(DEMO)
