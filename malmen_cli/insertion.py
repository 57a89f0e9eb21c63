"""MEMIT and its relatives on a base: facts with their subjects, statistics, and the base's own prefixes, to a Shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import encode_each
from malmen_cli.base.sampling import sampled_texts
from malmen_cli.editing.methods.memit import Memit, memit_modules
from malmen_cli.editing.moments import Statistics
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.shift import Shift
from malmen_cli.editing.targets import Wordings, wordings_of
from malmen_cli.facts.fact import Fact
from malmen_cli.key_statistics import Text, gather_statistics


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
    """The method ready for `base`; statistics are built where the cache has none.

    facts: those to be edited, which are refused, if they must be, before that. stats_from: a text file or data set;
    None: text of the base's own. seed: of the prefixes.
    """
    modules = memit_modules(base.model, settings)
    encode_wordings(base, facts, settings)
    text = Text(base, stats_from, settings.stats_tokens)
    statistics, _ = gather_statistics(base, modules, text, batch_size=batch_size, note=note)
    return Insertion(method, settings, tuple(modules), statistics, own_prefixes(base, settings, seed))


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

    keeping: where a Runner keeps what the blocks in front gave.
    """
    wordings = encode_wordings(base, facts, ready.settings, ready.prefixes)
    method = Memit(ready.settings, ready.statistics)
    return method.shift(
        base, ready.modules, wordings, batch_size=batch_size, keeping=keeping, progress=progress, note=note
    )
