"""A base that knows who lives where, trained here in seconds, and tiny bases with facts to train editors on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base, load_base
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

TEMPLATES = ("these days {} lives in", "the home of {} is")  # of one length
PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy", "Bill Gates")
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris", "no", "krona")
SMALL = {"last_blocks": 1, "rank": 4, "preserved_rank": 8}
SHORT = {
    "steps": 6,
    "facts_per_step": (4, 8),
    "meta_facts": 4,
    "validate_every": 2,
    "valid_facts": 4,
    "warmup": 2,
    "calibration_facts": 8,
    "continuation": 2,
}


def _facts(count: int, *, probes: bool = True) -> list[Fact]:
    """Facts in the words of the tiny tokenizers, of unequal length; every third fact has two rephrases."""
    facts = []
    for i in range(count):
        place = f"{PLACES[i % 8]} number {i}"
        rephrases = (f"{place} has the capital", f"Which city is the capital of {place}? It is")[: 1 + (i % 3 == 0)]
        locality = (Probe(f"The currency of {PLACES[(i + 1) % 8]} {i} is the"),) if probes else ()
        target = ANSWERS[i % 6]
        facts.append(
            Fact(f"f{i}", f"The capital of {place} is", target, subject=place, rephrases=rephrases, locality=locality)
        )
    return facts


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., list[Fact]]:
    return _facts


@pytest.fixture(scope="session")
def tiny_base(tiny_gpt2: Path) -> Base:
    """Shared; leave its weights as they are."""
    return load_base(str(tiny_gpt2), device="cpu")


@pytest.fixture
def make_trainer(tiny_base: Base) -> Callable[..., Trainer]:
    """`make_trainer(facts, valid, **training settings)` on the tiny base; not yet prepared."""

    def build(
        facts: list[Fact], valid: list[Fact], *, settings: dict[str, Any] | None = None, **training: Any
    ) -> Trainer:
        editor = Editor.fresh(tiny_base.model, MalmenSettings(**SMALL | (settings or {})))
        runner = Runner(tiny_base, min(block_index(tiny_base.model, name) for name in editor.names))
        parts = (encode_examples(tiny_base.task, some, end_of_text=True) for some in (facts, valid))
        return Trainer(runner, editor, *parts, TrainingSettings(**SHORT | training), batch_size=8)

    return build


# ---------------------------------------------------------------- a base that knows something


@dataclass(frozen=True)
class Town:
    """A base that says where each of its people lives, in two templates, and facts that move some of them."""

    base: Base
    train: list[Fact]
    valid: list[Fact]


def _word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def _memorise(model: Any, texts: torch.Tensor, steps: int = 250, rate: float = 1e-2) -> float:
    """Train until every text's last two tokens (city and end) are known; the share of cities that are the argmax."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = texts[torch.randint(len(texts), (100,))]
        loss = torch.nn.functional.cross_entropy(model(batch).logits[:, -3:-1].flatten(0, 1), batch[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(texts).logits[:, -3].argmax(-1) == texts[:, -2]).float().mean())


def prompts(person: str) -> list[str]:
    return [template.format(person) for template in TEMPLATES]


@pytest.fixture(scope="session")
def town() -> Town:
    from transformers import GPT2Config, GPT2LMHeadModel

    chooser = random.Random(0)
    people, cities = [f"p{i}" for i in range(200)], [f"c{i}" for i in range(16)]
    home = {person: chooser.choice(cities) for person in people}
    tokenizer = _word_tokenizer([*people, *cities, *["these", "days", "the", "home", "of", "is", "lives", "in"]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=16,
            n_embd=48,
            n_layer=4,
            n_head=4,
            n_inner=192,
            eos_token_id=0,
            bos_token_id=0,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = GPT2LMHeadModel(config)
        texts = [f"{prompt} {home[person]} <eos>" for person in people for prompt in prompts(person)]
        known = _memorise(model, torch.tensor(tokenizer(texts)["input_ids"]))
    assert known > 0.98, known
    facts = []
    for index, person in enumerate(2 * people[80:]):  # the others stay, and each of their prompts is a fact's probe
        to = chooser.choice([city for city in cities if city != home[person]])
        other = people[index % 80]
        probe = Probe(prompts(other)[index // 80 % 2], home[other])
        first, second = prompts(person)
        facts.append(Fact(f"{person}-{to}", first, to, subject=person, rephrases=(second,), locality=(probe,)))
    model.eval().requires_grad_(False)
    return Town(Base("town", Path("town"), None, "0" * 64, model, tokenizer), facts[:120], facts[120:150])


@pytest.fixture
def town_trainer(town: Town) -> Callable[..., Trainer]:
    """`town_trainer(**training settings)` for six facts at once; not yet prepared."""

    def build(**training: Any) -> Trainer:
        settings = MalmenSettings(last_blocks=2, rank=32, preserved_rank=64, preserved_weight=100.0)
        editor = Editor.fresh(town.base.model, settings)
        runner = Runner(town.base, min(block_index(town.base.model, name) for name in editor.names))
        parts = (encode_examples(town.base.task, some, end_of_text=True) for some in (town.train, town.valid))
        chosen = {"facts_per_step": (6,), "meta_facts": 6, "calibration_facts": 6, "continuation": 2, "warmup": 5}
        chosen |= {"meta_lr": 3e-3, "validate_every": 1000, "valid_facts": 30}
        return Trainer(runner, editor, *parts, TrainingSettings(**chosen | training), batch_size=64)

    return build
