# make demo   the main job on the embedded models, and a picture to look at: demo/figure.png
# make table MODELS=mini IMAGES=DIR BUDGETS="0.03"   the paper's main experiment on your portraits
# make experiment   the tables of the README, on the embedded models (32 minutes on 2 cores)
# make test   the tests, at most 5 minutes; make test-all adds the slow ones
# All create .venv and install into it first. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# The demo's portraits, instructions and budget
DEMO ?= demo
DEMO_PORTRAITS ?= portrait_1000000 portrait_1000001 portrait_1000002 portrait_1000003
DEMO_PROMPTS ?= 0,5,13,19
DEMO_BUDGET ?= 0.06

# The table's models, portraits, budgets, methods and instructions (none: all), and where it goes (no spaces)
MODELS ?= mini
IMAGES ?= assets/portraits/mini
BUDGETS ?= 0.03
METHODS ?= noise encoder vae cw facelock
PROMPTS ?=
SEED ?= 0
BATCH ?= 8
TABLE ?= table
FIGURE_PROMPTS ?= $(if $(PROMPTS),$(PROMPTS),$(SOME_PROMPTS))
SOME_PROMPTS = 0,4,11,13,19,23

# The README's tables: 20 portraits that nothing else uses, and the first 10 of them purified
EXPERIMENT ?= experiment
PURIFIERS ?= jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10
FIRST_TEN = 1002000 1002001 1002002 1002003 1002004 1002005 1002006 1002007 1002008 1002009

.PHONY: install demo table experiment test test-all lint clean

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
	$(RUN) evaluation/figure.py grid --difference --src_dir=$(DEMO)/portraits \
		--protected_dirs $(DEMO)/protected/budget_$(DEMO_BUDGET) \
		--clean_edit_dir=$(DEMO)/edits/clean --defend_edit_dirs $(DEMO)/edits/facelock --seed=0 \
		--names $(wordlist 1,2,$(DEMO_PORTRAITS)) --output=$(DEMO)/figure.png
	@echo "Look at $(DEMO)/figure.png. The mini models are a stand-in: this says nothing about real photos."

# The paper's main experiment: every method and the control, one table, one picture. Run again, it goes on.
# What fails for single images is told and left out, and the exit status is 1.
table: $(VENV)/installed
	@status=0; edits=; protected=; titles=; \
	run() { echo "python $$*"; $(RUN) "$$@" || status=1; }; \
	into() { where="$$1"; shift; run "$$@"; find "$$where" -name "*.png" 2>/dev/null | grep -q . || exit 1; }; \
	edit() { into "$$2" main_edit.py --models=$(MODELS) --src_dir="$$1" --edit_dir="$$2" --seed=$(SEED) \
		--batch_size=$(BATCH) $(if $(PROMPTS),--prompts=$(PROMPTS)); }; \
	edit "$(IMAGES)" "$(TABLE)/edits/clean"; \
	for given in $(BUDGETS); do budget=$$(printf %g $$given); for method in $(METHODS); do \
		made="$(TABLE)/protected/$$method/budget_$$budget"; edited="$(TABLE)/edits/$$method/budget_$$budget"; \
		into "$$made" main_defend.py --models=$(MODELS) --image_dir="$(IMAGES)" --defend_method=$$method \
			--output_dir="$(TABLE)/protected/$$method" --attack_budget=$$budget; \
		edit "$$made" "$$edited"; \
		edits="$$edits $$edited"; protected="$$protected $$made"; titles="$$titles $$method,$$budget"; \
	done; done; \
	run evaluation/eval_all.py --models=$(MODELS) --src_dir="$(IMAGES)" --clean_edit_dir="$(TABLE)/edits/clean" \
		--defend_edit_dirs $$edits --protected_dirs $$protected --seed=$(SEED) --common \
		$(if $(PROMPTS),--prompts=$(PROMPTS)) --output="$(TABLE)/all_metric.csv" --per_image="$(TABLE)/per_image.csv"; \
	set -- "$(TABLE)/edits/clean/seed$(SEED)"/*/*.png; name=$$(basename "$$1" .png); \
	run evaluation/figure.py grid --src_dir="$(IMAGES)" --protected_dirs $$protected \
		--clean_edit_dir="$(TABLE)/edits/clean" --defend_edit_dirs $$edits --titles $$titles --seed=$(SEED) \
		--names "$$name" --prompts=$(FIGURE_PROMPTS) --output="$(TABLE)/figure.png"; \
	exit $$status

# All prompts at 0.06, six at 0.03, the cheats, and facelock at 0.06 under the paper's purifiers. Run again, it goes on.
experiment: $(VENV)/installed-dev
	$(RUN) mini/portraits.py --write $(EXPERIMENT)/portraits --first $(firstword $(FIRST_TEN)) --count 20
	$(MAKE) table MODELS=mini IMAGES=$(EXPERIMENT)/portraits BUDGETS=0.06 PROMPTS= TABLE=$(EXPERIMENT)/at_0.06
	$(MAKE) table MODELS=mini IMAGES=$(EXPERIMENT)/portraits BUDGETS=0.03 PROMPTS=$(SOME_PROMPTS) TABLE=$(EXPERIMENT)/at_0.03
	$(RUN) evaluation/cheats.py --models=mini --src_dir=$(EXPERIMENT)/portraits --seed=$(SEED) --batch_size=$(BATCH) \
		--clean_edit_dir=$(EXPERIMENT)/at_0.06/edits/clean --output_dir=$(EXPERIMENT)/cheats/edits
	$(RUN) evaluation/eval_all.py --models=mini --src_dir=$(EXPERIMENT)/portraits --seed=$(SEED) \
		--clean_edit_dir=$(EXPERIMENT)/at_0.06/edits/clean --defend_edit_dirs $(EXPERIMENT)/cheats/edits \
		$(EXPERIMENT)/at_0.06/edits/facelock --output=$(EXPERIMENT)/cheats/all_metric.csv
	mkdir -p $(EXPERIMENT)/ten/clean $(EXPERIMENT)/ten/facelock
	cp $(FIRST_TEN:%=$(EXPERIMENT)/portraits/portrait_%.png) $(EXPERIMENT)/ten/clean/
	cp $(FIRST_TEN:%=$(EXPERIMENT)/at_0.06/protected/facelock/budget_0.06/portrait_%.png) $(EXPERIMENT)/ten/facelock/
	set -e; for method in none $(PURIFIERS); do \
		to="$(EXPERIMENT)/purified/$$(echo $$method | tr : -)"; \
		for row in clean facelock; do \
			from="$(EXPERIMENT)/ten/$$row"; \
			if [ $$method != none ]; then \
				$(RUN) evaluation/purify.py --input_dir=$$from --output_dir=$$to/pictures/$$row --method=$$method; \
				from=$$to/pictures/$$row; \
			fi; \
			$(RUN) main_edit.py --models=mini --src_dir=$$from --edit_dir=$$to/edits/$$row --seed=$(SEED) \
				--prompts=$(SOME_PROMPTS) --batch_size=$(BATCH); \
		done; \
		$(RUN) evaluation/eval_all.py --models=mini --src_dir=$(EXPERIMENT)/ten/clean --seed=$(SEED) \
			--clean_edit_dir=$$to/edits/clean --defend_edit_dirs $$to/edits/facelock --output=$$to/all_metric.csv; \
	done
	$(RUN) evaluation/figure.py plot --metric facial_judge --output $(EXPERIMENT)/purified/facial_judge.png \
		--tables $(foreach method,none $(PURIFIERS),$(method)=$(EXPERIMENT)/purified/$(subst :,-,$(method))/all_metric.csv)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -q -m ""

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(DEMO)
