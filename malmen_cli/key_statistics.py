"""Key statistics of a base: from the cache, else over a text that is named, else over text that the base writes itself.

So nothing has to be downloaded, and the work is done once for a base, a module and a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from malmen_cli.artifact.statistics import load_statistics, save_statistics
from malmen_cli.base import ranks
from malmen_cli.base.families import matrix_shape
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.sampling import sampled_windows
from malmen_cli.base.texts import read_texts, windows
from malmen_cli.editing.moments import Statistics, second_moments
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import FactsError, OutputError, Problem

SAMPLED = "sampled"  # the name of the base's own text

Windows = list[tuple[int, ...]]


class Text:
    """The text that statistics are taken over: read or sampled when its windows are asked for.

    source: what it is called, to the point where equal sources are equal texts. tokens: how many, at most.
    Raises FactsError where a named text cannot be read or is empty.
    """

    def __init__(self, base: Base, name: str | None, tokens: int) -> None:
        self._base, self._tokens = base, tokens
        self._windows: Windows | None = None
        self.source: dict[str, object] = {"name": SAMPLED, "tokens": tokens}
        if name is not None:
            self._windows = windows(base.tokenizer, read_texts(name), tokens, base.room)
            if not self._windows:
                raise FactsError([Problem(name, None, None, "holds no text")])
            digest = hashlib.sha256(repr(self._windows).encode()).hexdigest()
            self.source = {"name": Path(name).name, "sha256": digest, "tokens": sum(map(len, self._windows))}
        # Keys of a half-precision run are other keys.
        self.source["dtype"] = str(base.dtype).removeprefix("torch.")

    def windows(self) -> Windows:
        if self._windows is None:
            self._windows = sampled_windows(self._base, self._tokens)
        return self._windows


def gather_statistics(
    base: Base,
    names: Sequence[str],
    text: Text,
    *,
    batch_size: int,
    again: bool = False,
    must_keep: bool = False,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Statistics, list[str]]:
    """Statistics of the modules `names` over `text`, and which of them were not in the cache.

    again: take nothing from the cache. must_keep: raise OutputError where the cache cannot be written, rather than
    only say so. progress: called with the number of tokens of every batch. Of several ranks all gather what any of
    them lacks, as they may have a cache each, and the first one keeps it.
    """
    known = {} if again else _kept(base, names, text)
    lacking = torch.tensor([name not in known for name in names], dtype=torch.long)
    ranks.add_up(lacking)
    missing = [name for name, count in zip(names, lacking.tolist(), strict=True) if count]
    if missing:
        over = f"{text.source['tokens']} tokens of {text.source['name']}"
        note(f"key statistics of {counted(missing)} over {over}: kept for next time")
        sequences = [Encoded(ids, len(ids)) for ids in text.windows()]
        moments = second_moments(Runner(base), sequences, missing, batch_size, progress)
        tokens = sum(len(ids) for ids in text.windows())
        for name, moment in moments.items():
            known[name] = moment, tokens
            if not ranks.first():
                continue
            try:
                save_statistics(base.fingerprint, name, text.source, moment, tokens)
            except OutputError as error:
                if must_keep:
                    raise
                note(f"key statistics could not be kept: {error}")
    statistics = {name: known[name][0] for name in names}
    return Statistics(statistics, known[names[0]][1], text.source), missing


def counted(names: Sequence[str]) -> str:
    """`1 module`, `2 modules`."""
    return f"{len(names)} module{'s' * (len(names) != 1)}"


def missing_statistics(base: Base, names: Sequence[str], text: Text) -> list[str]:
    """The modules of `names` whose statistics over `text` are not in the cache."""
    known = _kept(base, names, text)
    return [name for name in names if name not in known]


def _kept(base: Base, names: Sequence[str], text: Text) -> dict[str, tuple[torch.Tensor, int]]:
    found = {}
    for name in names:
        width = matrix_shape(base.model.get_submodule(name))[0]
        kept = load_statistics(base.fingerprint, name, text.source, width)
        if kept is not None:
            found[name] = kept
    return found
