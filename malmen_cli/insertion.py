"""MEMIT and its relatives on a base: facts with their subjects, statistics, and the base's own prefixes, to a Shift."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers

from malmen_cli import __version__
from malmen_cli.artifact.targets import load_targets, save_targets
from malmen_cli.base.families import block_index, matrix_shape
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import encode_each
from malmen_cli.base.sampling import sampled_texts
from malmen_cli.editing.methods.memit import Memit, memit_modules
from malmen_cli.editing.moments import Statistics
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.shift import Shift
from malmen_cli.editing.targets import Targets, Wordings, wordings_of
from malmen_cli.exceptions import OutputError
from malmen_cli.facts.fact import Fact
from malmen_cli.key_statistics import Text, gather_statistics

SEARCH = 2  # counts the ways in which targets were looked for: another rounds otherwise
TARGET_SETTINGS = ("steps", "lr", "clamp", "kl_factor", "decay", "stop_loss")  # that targets depend on


@dataclass(frozen=True)
class Insertion:
    """MEMIT, ROME or AlphaEdit, ready for one base: what it edits, and what it has to know of the base."""

    method: str
    settings: MemitSettings
    modules: tuple[str, ...]
    statistics: Statistics
    prefixes: tuple[str, ...] = ()

    def record(self) -> dict[str, object]:
        """What `malmen.json` says of the text behind the statistics."""
        return {**self.statistics.source, "tokens": self.statistics.tokens}


def encode_wordings(
    base: Base, facts: Sequence[Fact], settings: MemitSettings, prefixes: Sequence[str] = ()
) -> list[Wordings]:
    """Every fact as its target is looked for. Raises FactsError naming each fact that cannot be, as for want of a
    subject."""
    return encode_each(
        facts,
        lambda fact: wordings_of(
            base.tokenizer,
            fact.prompt,
            fact.target,
            fact.subject,
            prefixes,
            end_of_text=settings.end_of_text,
            room=base.room,
        ),
    )


def prepare(
    base: Base,
    method: str,
    settings: MemitSettings,
    facts: Sequence[Fact] = (),
    *,
    stats_from: str | None,
    seed: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Insertion:
    """The method ready for `base`, with what its settings leave to the number of facts; statistics are built where the
    cache has none.

    facts: those to be edited, which are refused, if they must be, before that. stats_from: a text file or data set;
    None: text of the base's own. seed: of the prefixes.
    """
    modules = memit_modules(base.model, settings)
    encode_wordings(base, facts, settings)
    text = Text(base, stats_from, settings.stats_tokens)
    statistics, _ = gather_statistics(base, modules, text, batch_size=batch_size, note=note)
    chosen = settings.for_facts(len(facts))
    return Insertion(method, chosen, tuple(modules), statistics, own_prefixes(base, settings, seed))


def own_prefixes(base: Base, settings: MemitSettings, seed: int) -> tuple[str, ...]:
    """Short texts sampled from the base, on one line each; what is nothing but white space is left out."""
    if not settings.prefixes:
        return ()
    sampled = sampled_texts(base, settings.prefixes, settings.prefix_tokens, seed=seed)
    texts = (base.tokenizer.decode(list(text.ids), skip_special_tokens=True) for text in sampled)
    return tuple(filter(None, (" ".join(str(text).split()) for text in texts)))


def memit_shift(
    base: Base,
    ready: Insertion,
    facts: Sequence[Fact],
    *,
    batch_size: int,
    keeping: Mapping[str, int] | None = None,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Shift:
    """All facts in one shift. Raises FactsError, NumericsError, MemoryLimitError.

    base: with its own weights, under no other shift. keeping: where a Runner keeps what the blocks in front gave. The
    targets, by far the longest part, are kept in the cache as they are found: a run that was killed goes on behind
    them, and one with another lambda starts from them.
    """
    wordings = encode_wordings(base, facts, ready.settings, ready.prefixes)
    kept = TargetCache(base, ready.modules[-1], ready.settings)
    return Memit(ready.settings, ready.statistics).shift(
        base, ready.modules, wordings, batch_size=batch_size, keeping=keeping, kept=kept, progress=progress, note=note
    )


class TargetCache:
    """Targets behind the block of `module`, kept under everything that they depend on (a `KeptTargets`).

    The base has its own weights: what a shift applied to it changes is no part of its fingerprint.
    """

    def __init__(self, base: Base, module: str, settings: MemitSettings) -> None:
        self.taken = 0
        self.trouble: str | None = None
        self._base = base
        self._width = matrix_shape(base.model.get_submodule(module))[1]
        config = {key: value for key, value in base.model.config.to_dict().items() if key != "_name_or_path"}
        shape = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        # Not the weights alone decide what a model computes, nor malmen alone how it is asked.
        self._source: dict[str, object] = {"block": block_index(base.model, module), "config": shape}
        self._source |= {"dtype": str(base.dtype).removeprefix("torch."), "device": base.device.type}
        self._source |= {
            "search": SEARCH,
            "malmen": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self._source |= {name: getattr(settings, name) for name in TARGET_SETTINGS}

    def load(self, facts: Sequence[Wordings]) -> Targets | None:
        found = load_targets(self._base.fingerprint, self._of(facts), len(facts), self._width)
        self.taken += 0 if found is None else len(facts)
        return found

    def save(self, facts: Sequence[Wordings], found: Targets) -> None:
        try:
            save_targets(self._base.fingerprint, self._of(facts), found)
        except OutputError as error:
            self.trouble = str(error)

    def _of(self, facts: Sequence[Wordings]) -> dict[str, object]:
        return self._source | {"facts": hashlib.sha256(repr(list(facts)).encode()).hexdigest()}
