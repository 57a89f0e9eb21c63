"""The last look at a shift before anything is written: would it leave a model at all?

Judged by ||S|| / ||W|| of every module. Seen on smollm2-135m: .46 with its editor at 1,024 facts and .28 at 7,499, .55
when fine-tuned on 1,024; 1.23 on a classifier that was fine-tuned on 1,024 claims. MEND editors that wrecked the model
came to 6.1, which this bound lets pass, and to 877. At ten times the weight's own norm next to nothing is left of it.
Random models of 16 features, which hold few facts apart, can need more than that (12 was seen): they need --force.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch

from malmen_cli.artifact.delta import norm_of
from malmen_cli.base.model import Base
from malmen_cli.editing.capture import losses_of
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.shift import Shift, applied
from malmen_cli.exceptions import NumericsError
from malmen_cli.facts.contradictions import contradictions
from malmen_cli.facts.fact import Fact

MAX_RELATIVE_NORM = 10.0  # some eight times the largest edit of a real model that was not a wreck
NAMED = 3  # facts, or pairs of them, that a message names


def refuse_destructive(
    base: Base, shift: Shift, facts: Sequence[Fact], *, batch_size: int, force: bool, warn: Callable[[str], None]
) -> None:
    """Raise NumericsError for a shift of more than MAX_RELATIVE_NORM, naming the module and the facts to blame.

    force: only warn.
    """
    name, size = largest(base, shift)
    if size <= MAX_RELATIVE_NORM:
        return
    norms = f"{size:.1f} times the weight's own norm (above {MAX_RELATIVE_NORM:g})"
    said = f"{name}: the shift is {norms}, which destroys the model"
    if force:
        warn(f"{said}; written all the same, as --force was given")
        return
    blame = "; ".join(filter(None, (_contradicting(facts), _unlearned(base, shift, facts, batch_size))))
    raise NumericsError(f"{said}: {blame}; take these facts out, edit fewer at once, or use --force")


def largest(base: Base, shift: Shift) -> tuple[str, float]:
    """The module whose shift is largest beside its weight, and how large: ||S|| / ||W||."""
    sizes = {}
    for name, module in shift.modules.items():
        weight = float(base.model.get_submodule(name).weight.detach().double().norm())
        sizes[name] = norm_of(module) / max(weight, torch.finfo(torch.float32).tiny)
    name = max(sizes, key=lambda module: sizes[module])
    return name, sizes[name]


def residuals(base: Base, shift: Shift, facts: Sequence[Fact], batch_size: int) -> list[float]:
    """What the edited model has still to learn of each fact: nats a target token."""
    edits = [base.task.encode(fact.prompt, fact.target, room=base.room) for fact in facts]
    with applied(base.model, shift, stored=base.stored):
        return losses_of(Runner(base), edits, batch_size)


def _contradicting(facts: Sequence[Fact]) -> str:
    pairs = [f"{one.id} and {other.id}" for one, other in islice(contradictions(facts), NAMED)]
    return f"facts that contradict each other: {', '.join(pairs)}" if pairs else ""


def _unlearned(base: Base, shift: Shift, facts: Sequence[Fact], batch_size: int) -> str:
    left = residuals(base, shift, facts, batch_size)
    worst = sorted(range(len(facts)), key=lambda i: (left[i] == left[i], -left[i]))[:NAMED]  # NaN is worst of all
    return "largest residuals: " + ", ".join(f"{facts[i].id} ({left[i]:.1f} nats)" for i in worst)
