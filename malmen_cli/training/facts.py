"""Facts as the meta-loop needs them: encoded once, drawn by (seed, step) so that a resumed run draws the same."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from malmen_cli.base.prompts import Encoded, check_room, encode_each
from malmen_cli.base.tasks import Task
from malmen_cli.facts.fact import Fact
from malmen_cli.training.settings import TrainingSettings


@dataclass(frozen=True)
class Example:
    """One fact encoded: its edit, its other wordings with the same target, its locality prompts; and its id."""

    edit: Encoded
    rephrases: tuple[Encoded, ...]
    probes: tuple[Encoded, ...]
    id: str

    def wordings(self) -> tuple[Encoded, ...]:
        return (self.edit, *self.rephrases)


def encode_examples(task: Task, facts: Sequence[Fact], *, end_of_text: bool, room: int | None = None) -> list[Example]:
    """Every fact's prompts and probes as tokens. Raises FactsError naming each fact with none, or more than `room`."""

    def encoded(fact: Fact) -> Example:
        edit, *rephrases = (
            task.encode(prompt, fact.target, end_of_text=end_of_text, room=room, subject=fact.subject)
            for prompt in (fact.prompt, *fact.rephrases)
        )
        probes = tuple(task.question(probe.prompt) for probe in fact.locality)
        for probe in probes:
            check_room(max(len(probe.source), len(probe.ids) + 1), room, "locality")
        return Example(edit, tuple(rephrases), probes, fact.id)

    return encode_each(facts, encoded)


Cohort = tuple[Example, ...]


def cohorts(examples: Sequence[Example], size: int, seed: int) -> list[Cohort]:
    """Facts in fixed groups of `size` that are always drawn together, alike in the length of their probes.

    What is computed once and kept (prefix states, the base's answers) is then computed for a whole group, in a
    batch that needs no padding and does not depend on what was computed before. A probe that several facts share
    stays with the first of them.
    """
    chooser = random.Random(f"{seed}:cohorts")
    seen: set[Encoded] = set()
    examples = [_without(example, seen) for example in examples]
    keyed = [(e.probes[0].length if e.probes else 0, chooser.random(), i) for i, e in enumerate(examples)]
    order = [i for _, _, i in sorted(keyed)]
    groups = [tuple(examples[i] for i in order[start : start + size]) for start in range(0, len(order), size)]
    chooser.shuffle(groups)
    # Facts that are judged come from the front: there stand those with probes of their own.
    return sorted(groups, key=lambda group: not any(example.probes for example in group))


def _without(example: Example, seen: set[Encoded]) -> Example:
    """The example without the probes already seen, which then are its own."""
    probes = tuple(probe for probe in dict.fromkeys(example.probes) if probe not in seen)
    seen.update(probes)
    return replace(example, probes=probes)


@dataclass(frozen=True)
class Draw:
    """One step's facts: all `edits`, of the facts `ids`, go into one shift; the meta-loss is taken on `wordings` and
    `probes`."""

    ids: list[str]
    edits: list[Encoded]
    wordings: list[Encoded]
    probes: list[Encoded]


def draw(groups: Sequence[Cohort], settings: TrainingSettings, seed: int, step: int) -> Draw:
    """The facts of one step, a function of (seed, step) alone: whole cohorts, one wording and probe index each."""
    chooser = random.Random(f"{seed}:{step}")
    low, high = math.log(min(settings.facts_per_step)), math.log(max(settings.facts_per_step))
    size, each = math.exp(chooser.uniform(low, high)), max(map(len, groups))
    count = min(max(1, round(size / each)), len(groups))
    pool = max(1, min(len(groups), -(-settings.judged_facts // each)))
    judged = chooser.sample(range(pool), min(pool, count, max(1, round(settings.meta_facts / each))))
    others = chooser.sample([i for i in range(len(groups)) if i not in judged], count - len(judged))
    wordings, probes = [], []
    for cohort in (groups[i] for i in judged):
        place = chooser.randrange(1 << 16)
        wordings += [example.wordings()[place % len(example.wordings())] for example in cohort]
        probes += [example.probes[place % len(example.probes)] for example in cohort if example.probes]
    drawn = [example for i in (*judged, *others) for example in groups[i]]
    return Draw([example.id for example in drawn], [example.edit for example in drawn], wordings, probes)


def random_sample(items: Sequence[Any], size: int, seed: int) -> list[Any]:
    """At most `size` of the items, the same for the same seed."""
    return random.Random(f"{seed}:preserved").sample(list(items), min(size, len(items)))
