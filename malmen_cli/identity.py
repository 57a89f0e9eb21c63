"""An editor without a trained network: normaliser, preserved keys and step from the facts that it is to edit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.sampling import sampled_texts
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.exceptions import naming
from malmen_cli.facts.fact import Fact
from malmen_cli.training.calibration import Calibration, calibrate, preserve
from malmen_cli.training.facts import Example, encode_examples
from malmen_cli.training.references import References

CALIBRATION_FACTS = 1024  # of the given facts, edited at once while an identity network's step is searched
JUDGED_FACTS = 64  # of those, whose wordings and locality probes decide
IDENTITY_LOCALITY_WEIGHT = 3.0  # the score is a harmonic mean: what moved costs more than what was not learned
PRESERVED_FACTS = 1000  # whose locality prompts make C0
CONTINUATION = 6  # tokens of the base's own text after a locality prompt that calibration tries to keep


def untrained_editor(
    base: Base,
    facts: Sequence[Fact],
    settings: MalmenSettings,
    *,
    seed: int,
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Editor, Calibration]:
    """The editor of `settings` (network: identity), and how its step was found. Raises FactsError, NumericsError,
    MemoryLimitError.

    The step is the one that makes the edits stick while what the base says after the facts' locality prompts, or in
    its own sampled text where there are none, diverges least.
    """
    editor = Editor.fresh(base.model, settings)
    runner = Runner(base, min(block_index(base.model, name) for name in editor.names))
    sample = _spread(facts, CALIBRATION_FACTS)
    examples = encode_examples(base.task, sample, end_of_text=settings.end_of_text, room=base.room)
    own = sampled_texts(base, seed=seed)
    judged = examples[:JUDGED_FACTS]
    probes = [probe for example in judged for probe in example.probes[:1]] or [text.answered(()) for text in own]
    preserve(editor, runner, [*own, *_locality(base, facts)], batch_size)
    with naming([example.id for example in examples]):
        calibration = calibrate(
            editor,
            runner,
            [example.edit for example in examples],
            _wordings(judged),
            References(runner, CONTINUATION, batch_size).of(probes),
            locality_weight=IDENTITY_LOCALITY_WEIGHT,
            batch_size=batch_size,
            note=note,
        )
    return editor, calibration


def _spread(facts: Sequence[Fact], size: int) -> list[Fact]:
    """`size` facts chosen by content, so that neither order nor neighbours decide."""
    keyed = sorted(facts, key=lambda fact: hashlib.sha256(f"{fact.prompt}\0{fact.target}".encode()).digest())
    return keyed[:size]


def _locality(base: Base, facts: Sequence[Fact]) -> list[Encoded]:
    examples = encode_examples(base.task, _spread(facts, PRESERVED_FACTS), end_of_text=False, room=base.room)
    return [probe for example in examples for probe in example.probes]


def _wordings(examples: Sequence[Example]) -> list[Encoded]:
    """Each fact's edit and one rephrase: what has to be learned."""
    return [wording for example in examples for wording in example.wordings()[:2]]
